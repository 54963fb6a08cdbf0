"""What the draws of several operators share."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from .case import Case

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def bounds(lengths: Sequence[int]) -> np.ndarray:
    """cu_seqlens."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def slots(
    case: Case, rng: np.random.Generator, n_seq: int, names: tuple[str, str] = ("state_indices", "dst_state_indices")
) -> dict[str, Any]:
    """Slots in random order, where sequences start and, with `dst`, where they store, by these argument `names`; null_slot."""
    S, spec = case.dims["S"], case.options.get("spec")
    source_name, target_name = names
    shape = (n_seq,) if spec is None else (n_seq, spec)
    count = n_seq * (spec or 1)
    options, null = case.options, 1 if case.options.get("padding") else None
    free = np.setdiff1d(np.arange(S), [] if null is None else [null])
    if options.get("high_slots"):
        free = free[-count:]
    order = rng.permutation(free)
    if len(order) < count * (2 if options.get("dst") and spec is None else 1):
        raise ValueError(f"{case}: S={S} slots are too few")
    source = order[:count].reshape(shape).astype(np.int32)
    keywords: dict[str, Any] = {source_name: source}
    if options.get("dst"):
        # Speculative decode moves states within a sequence's own slots; plain decode to slots nobody reads.
        target = source[:, ::-1] if spec else order[count : 2 * count]
        keywords[target_name] = np.ascontiguousarray(target.reshape(shape), np.int32)
    if null is not None:
        source[0] = -1
        source[-1] = null
        if options["padding"] == "all":
            source[:] = -1
        if options.get("dst") and n_seq > 2:
            keywords[target_name].flat[shape[-1] if spec else 1] = null
        keywords["null_slot"] = null
    return keywords
