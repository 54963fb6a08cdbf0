"""Random arguments for a case, drawn as the models initialise their parameters. Never zeros, always seeded."""

import itertools
import zlib
from typing import Any

import numpy as np

from .cases import GDN_STAGES, SSD_STAGES, Case
from .draws import DTYPES as DTYPES
from .draws import bounds, slots
from .inputs_gdn import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, gdn_stage
from .oracle import ssd


def draw(case: Case, seed: int = 0) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """(positional, keyword) NumPy arguments of `case.op`."""
    # Python's own hash() of a string differs from process to process.
    rng = np.random.default_rng([seed, zlib.crc32(str(case).encode())])
    return _DRAW[case.op](case, rng)


def _selective_state_update(case: Case, rng: np.random.Generator):
    S, B, H, G, P, N = (case.dims[key] for key in ("S", "B", "H", "G", "P", "N"))
    options = case.options
    x_dtype, state_dtype = DTYPES[case.dtype], DTYPES[case.state_dtype]
    spec = options.get("spec")

    lengths = options.get("lengths")
    n_seq = B if lengths is None else len(lengths)
    T = B if lengths is None else sum(lengths) + options.get("tail", 0)

    def normal(*shape, dtype=x_dtype):
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    untied = bool(options.get("untied"))
    per_head = (H, P) if untied else (H,)
    state, x = normal(S, H, P, N, dtype=state_dtype), normal(T, H, P)
    A = -rng.uniform(1, 16, (H, P, N) if untied else (H,)).astype(np.float32)
    dt_bias = None
    if options.get("dt_bias"):
        # Mamba-2's initialisation: softplus(dt_bias) is log-uniform in [1e-3, 1e-1].
        step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), per_head))
        # Without softplus the bias is a step itself: a negative one would let the state grow without bound.
        dt_bias = (step + np.log(-np.expm1(-step)) if options.get("dt_softplus") else step).astype(np.float32)
    dt = normal(T, *per_head)
    if not options.get("dt_softplus"):
        dt = (np.abs(dt.astype(np.float32)) * 0.05).astype(x_dtype)  # without softplus a step must be positive already
    B_, C = normal(T, G, N), normal(T, G, N)
    D = normal(*((H, P) if options.get("D_per_headdim") else (H,)), dtype=np.float32) if options.get("D") else None
    z = normal(T, H, P) if options.get("z") else None

    keywords: dict[str, Any] = {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": bool(options.get("dt_softplus"))}
    if options.get("slots") or spec:
        keywords |= slots(case, rng, n_seq, ("state_batch_indices", "dst_state_batch_indices"))
    if lengths is not None:
        keywords["cu_seqlens"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    if spec:
        # 0 and a count past the last column are both seen in serving; both must be clamped.
        keywords["num_accepted_tokens"] = np.resize([0, spec + 2, 1, 2], n_seq).astype(np.int32)
    if "rounding_seed" in options:
        keywords["rounding_seed"] = options["rounding_seed"]
    arrays = [state, x, dt, A, B_, C]
    if options.get("headless"):
        state, x, dt, A, B_, C = state[:, 0], x[:, 0], dt[:, 0], A[0], B_[:, 0], C[:, 0]
        arrays = [state, x, dt, A, B_, C]
        for key, axis in (("D", 0), ("dt_bias", 0), ("z", 1)):
            if keywords[key] is not None:
                keywords[key] = np.asarray(np.take(keywords[key], 0, axis=axis))
    # asarray, because ascontiguousarray would give a scalar A an axis
    return tuple(np.asarray(a, order="C") for a in arrays), {k: v for k, v in keywords.items() if v is not None}


def _conv_weight(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """weight and bias as torch's Conv1d initialises them: uniform within 1/sqrt(W)."""
    D, W = case.dims["D"], case.dims["W"]
    bound = W**-0.5
    weight = rng.uniform(-bound, bound, (D, W)).astype(DTYPES[case.dtype])
    bias = rng.uniform(-bound, bound, D).astype(DTYPES[case.dtype]) if case.options["bias"] else None
    return weight, bias


def _pool_slots(rng: np.random.Generator, S: int, n_seq: int, padding: bool) -> tuple[np.ndarray, int | None]:
    null = 1 if padding else None
    slots = rng.permutation(np.setdiff1d(np.arange(S), [] if null is None else [null]))[:n_seq].astype(np.int32)
    if null is not None:
        slots[0] = -1
        slots[-1] = null
    return slots, null


def _causal_conv1d(case: Case, rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    B, T, D, W = (case.dims[key] for key in ("B", "T", "D", "W"))
    dtype, options = DTYPES[case.dtype], case.options

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    weight, bias = _conv_weight(case, rng)
    lengths = options.get("lengths")
    if lengths is not None and sum(lengths) + options.get("tail", 0) != T:
        raise ValueError(f"{case}: the lengths and the tail add up to {sum(lengths) + options.get('tail', 0)}")
    n_seq = B if lengths is None else len(lengths)
    keywords: dict[str, Any] = {"bias": bias, "activation": options["activation"]}
    if lengths is not None:
        keywords["cu_seqlens"] = bounds(lengths)
    if options.get("initial"):
        keywords["initial_state"] = normal(n_seq, W - 1, D)
    if options.get("pool"):
        S = n_seq + 3
        keywords["conv_state"] = normal(S, W - 1 + options.get("spare_rows", 0), D)
        keywords["state_indices"], keywords["null_slot"] = _pool_slots(rng, S, n_seq, bool(options.get("padding")))
        keywords["has_initial_state"] = np.arange(n_seq) % 3 != 1
    for name in ("sizes", "chunk_size"):
        if name in options:
            keywords[name] = options[name]
    return (normal(B, T, D), weight), {k: v for k, v in keywords.items() if v is not None}


def _causal_conv1d_update(case: Case, rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    S, L, B, D = (case.dims[key] for key in ("S", "L", "B", "D"))
    dtype, options = DTYPES[case.dtype], case.options

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    weight, bias = _conv_weight(case, rng)
    lengths = options.get("lengths")
    T = B if lengths is None else sum(lengths) + options.get("tail", 0)
    keywords: dict[str, Any] = {"bias": bias, "activation": options["activation"]}
    if options["slots"]:
        padding = bool(options.get("padding"))
        keywords["conv_state_indices"], keywords["null_slot"] = _pool_slots(rng, S, B, padding)
    if lengths is not None:
        keywords["cu_seqlens"] = bounds(lengths)
    if options.get("spec"):
        keywords["num_accepted_tokens"] = np.resize([0, L + 2, 1, 2], B).astype(np.int32)
    return (normal(T, D), normal(S, L, D), weight), {k: v for k, v in keywords.items() if v is not None}


def chunk_aligned(tensor: np.ndarray, T: int, L: int, cu_seqlens: np.ndarray | None) -> np.ndarray:
    """Tokens at the rows in which `causal_conv1d_split` writes them, zeros between."""
    if cu_seqlens is None:
        rows = np.zeros((tensor.shape[0], -(-T // L) * L, *tensor.shape[2:]), tensor.dtype)
        rows[:, :T] = tensor
        return rows
    rows = np.zeros((1, L * (T // L + len(cu_seqlens) - 1), *tensor.shape[2:]), tensor.dtype)
    for n, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
        first = L * (begin // L + n)
        rows[0, first : first + end - begin] = tensor[0, begin:end]
    return rows


def _mamba_chunk_scan_combined(case: Case, rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    B, T, H, G, P, N, L = (case.dims[key] for key in ("B", "T", "H", "G", "P", "N", "L"))
    dtype, options = DTYPES[case.dtype], case.options

    def normal(*shape, dtype=dtype):
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    if options.get("slow"):
        # A state that outlives thousands of tokens: what is wrong where pieces of a sequence meet stays visible.
        A, step = -rng.uniform(1e-3, 0.1, H), np.full(H, 7e-3)
    else:
        A, step = -rng.uniform(1, 16, H), np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), H))
    softplus = options.get("dt_softplus", True)
    dt, dt_bias = normal(B, T, H), (step + np.log(-np.expm1(-step))).astype(np.float32)
    if not softplus:
        dt, dt_bias = (np.abs(dt.astype(np.float32)) * 0.05).astype(dtype), None
    lengths = options.get("lengths")
    if lengths is not None and sum(lengths) + options.get("tail", 0) != T:
        raise ValueError(f"{case}: the lengths and the tail add up to {sum(lengths) + options.get('tail', 0)}")
    cu_seqlens = None if lengths is None else bounds(lengths)
    n_seq = B if lengths is None else len(lengths)
    x, B_, C = normal(B, T, H, P), normal(B, T, G, N), normal(B, T, G, N)
    if options.get("poison"):
        # Whatever stands where no token does must stay there.
        for tensor in (x, B_, C, dt):
            tensor[:, sum(lengths or ()) :] = np.nan
    keywords: dict[str, Any] = {
        "chunk_size": L, "dt_bias": dt_bias, "dt_softplus": softplus, "return_final_states": True, "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    if options.get("D"):
        keywords["D"] = normal(*((H, P) if options.get("D_per_headdim") else (H,)), dtype=np.float32)
    if options.get("z"):
        keywords["z"] = normal(B, T, H, P)
    if options.get("initial"):
        keywords["initial_states"] = normal(n_seq, H, P, N, dtype=DTYPES[case.state_dtype])
    if case.state_dtype != "float32":
        keywords["state_dtype"] = DTYPES[case.state_dtype]
    for name in ("dt_limit", "return_intermediate_states"):
        if name in options:
            keywords[name] = options[name]
    if options.get("chunk_aligned"):
        x, B_, C = (chunk_aligned(tensor, T, L, cu_seqlens) for tensor in (x, B_, C))
        keywords["chunk_aligned"] = True
    return (x, dt, A.astype(np.float32), B_, C), {k: v for k, v in keywords.items() if v is not None}


def _ssd_stage(case: Case, rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """A stage's operands: those of the whole operator, brought to it by the definitions of the stages before."""
    (x, dt, A, B, C), given = _mamba_chunk_scan_combined(case, rng)
    packed = {name: given[name] for name in ("cu_seqlens",) if name in given}
    H, P, N, L = (case.dims[key] for key in ("H", "P", "N", "L"))
    if case.op == "ssd.chunk_cumsum":
        options = {name: given[name] for name in ("dt_bias", "dt_softplus", "dt_limit") if name in given}
        return (dt, A), {"chunk_size": L, **options, **packed}
    if case.op == "ssd.bmm_chunk":
        return (C, B), {"chunk_size": L, **packed}
    options = {name: given[name] for name in ("dt_bias", "dt_softplus") if name in given}
    dA_cumsum, step = (a.astype(np.float32) for a in ssd.chunk_cumsum(dt, A, chunk_size=L, **options, **packed))
    if case.op == "ssd.chunk_state":
        return (x, B, step, dA_cumsum), packed
    states = rng.standard_normal((*dA_cumsum.shape[:1], dA_cumsum.shape[2], H, P, N), dtype=np.float32)
    if case.op == "ssd.state_passing":
        options = {name: given[name] for name in ("initial_states", "state_dtype") if name in given}
        return (states, dA_cumsum), packed | options
    CB = ssd.bmm_chunk(C, B, chunk_size=L, **packed).astype(np.float32)
    options = {name: given[name] for name in ("D", "z") if name in given}
    return (CB, x, step, dA_cumsum, C, states), packed | options


_DRAW = {
    "selective_state_update": _selective_state_update,
    "causal_conv1d": _causal_conv1d,
    "causal_conv1d_update": _causal_conv1d_update,
    "mamba_chunk_scan_combined": _mamba_chunk_scan_combined,
    **dict.fromkeys(SSD_STAGES, _ssd_stage),
    "chunk_gated_delta_rule": chunk_gated_delta_rule,
    "fused_recurrent_gated_delta_rule": fused_recurrent_gated_delta_rule,
    **dict.fromkeys(GDN_STAGES, gdn_stage),
}
