"""Tuning tables of `ssd.chunk_cumsum`."""

from ..devices import Device
from ..spec import Knobs, OpSpec, Statics
from . import _ssd

_KNOBS = (
    _ssd.block("BLOCK_SIZE_H", 1, 64, "heads that one program computes"),
    _ssd.block("BLOCK_SIZE_T", 16, 256, "tokens of a chunk that one step takes"),
    _ssd.NUM_WARPS,
)


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """A whole chunk at once where one is up to 256 tokens, for a sum that goes on from one block to the next waits for it; of
    4 heads, in warps of 4 elements a thread."""
    del dtype, device, size  # part of every heuristic's signature
    tokens = min(statics["chunk_size"], 256)
    return {"BLOCK_SIZE_H": 4, "BLOCK_SIZE_T": tokens, "num_warps": max(1, tokens // 32)}


SSD_CHUNK_CUMSUM = OpSpec(
    name="ssd_chunk_cumsum",
    static_keys=("nheads", "chunk_size"),
    dtype_key="dtype",
    dtypes=_ssd.DTYPES,
    dtype_aliases=_ssd.DTYPE_ALIASES,
    # Of all sequences; nheads: those on this device, after tensor parallelism.
    size_key="tokens",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=_ssd.pallas_knobs(_KNOBS),
    pallas_rule=_ssd.pallas_rule,
    heuristic=heuristic,
    tuned_at=("B", "T"),
    vllm_compatible=False,
)
