"""Random arguments of the gated delta rule's operators."""

from typing import Any

import numpy as np

from .case import Case
from .draws import DTYPES, bounds, slots
from .oracle import gdn
from .oracle.chunks import chunks

Arguments = tuple[tuple[np.ndarray, ...], dict[str, Any]]


def chunk_gated_delta_rule(case: Case, rng: np.random.Generator) -> Arguments:
    drawn = _drawn(case, rng)
    keywords = drawn | {
        "chunk_size": case.dims["L"], "return_final_state": True, "use_qk_l2norm": bool(case.options.get("l2norm")),
    }  # fmt: skip
    arguments = tuple(keywords.pop(name) for name in ("q", "k", "v", "g", "beta"))
    return arguments, _given(keywords)


def gdn_stage(case: Case, rng: np.random.Generator) -> Arguments:
    """A stage's operands: those of the whole operator, brought to it by the definitions of the stages before."""
    drawn, L, dtype = _drawn(case, rng), case.dims["L"], DTYPES[case.dtype]
    k, v, beta = (drawn[name] for name in ("k", "v", "beta"))
    packed: dict[str, Any] = _given({"cu_seqlens": drawn["cu_seqlens"]})
    sized = {"chunk_size": L, **packed}
    if case.op == "gdn.chunk_local_cumsum":
        return (drawn["g"],), sized
    gate = {}
    if case.options.get("gated", True):
        gate = {"g": gdn.chunk_local_cumsum(drawn["g"], **sized).astype(np.float32)}
    if case.op == "gdn.chunk_scaled_dot_kkt":
        return (k, beta), gate | sized
    if case.op == "gdn.chunk_o":
        return _chunk_o(case, rng, drawn, gate, sized)
    A = gdn.chunk_scaled_dot_kkt(k, beta, **gate, **sized).astype(np.float32)
    if case.op == "gdn.solve_tril":
        return (A,), packed
    inverse = gdn.solve_tril(A, **packed).astype(dtype)
    if case.op == "gdn.recompute_w_u":
        return (k, v, beta, inverse), gate | packed
    w, u = (made.astype(dtype) for made in gdn.recompute_w_u(k, v, beta, inverse, **gate, **packed))
    return (k, w, u), gate | sized | _given({"initial_state": drawn["initial_state"]})


def _chunk_o(case: Case, rng: np.random.Generator, drawn: dict, gate: dict, sized: dict) -> Arguments:
    """States of their own: those of the definition would be near nothing where gates are fast."""
    B, T, H_v, K, V = (case.dims[key] for key in ("B", "T", "H_v", "K", "V"))
    NC, found = chunks(B, T, case.dims["L"], drawn["cu_seqlens"])
    h = rng.standard_normal((B, NC, H_v, K, V), dtype=np.float32)
    unused = np.ones((B, NC), bool)
    for chunk in found:
        unused[chunk.b, chunk.slot] = False
    h[unused] = np.nan  # as `chunk_delta_h` may leave them
    if case.options.get("gate_base") == "2":
        gate = {"g": (gate["g"] * np.log2(np.e)).astype(np.float32), "gate_base": "2"}
    if case.options.get("state_layout") == "VK":
        h = np.ascontiguousarray(h.swapaxes(-1, -2))
        sized = sized | {"state_layout": "VK"}
    scale = _given({"scale": drawn["scale"]})
    return (drawn["q"], drawn["k"], drawn["v"], h.astype(DTYPES[case.dtype])), gate | sized | scale


def fused_recurrent_gated_delta_rule(case: Case, rng: np.random.Generator) -> Arguments:
    S, B, H_v, K, V = (case.dims[key] for key in ("S", "B", "H_v", "K", "V"))
    options, lengths = case.options, case.options.get("lengths")
    T = B if lengths is None else sum(lengths) + options.get("tail", 0)
    drawn = {name: array[0] for name, array in _tokens(case, rng, 1, T).items()}
    keywords: dict[str, Any] = {"use_qk_l2norm": bool(options.get("l2norm")), "scale": options.get("scale")}
    if options.get("gates"):
        step = _step(rng, H_v)
        drawn["g"], drawn["beta"] = rng.standard_normal((2, T, H_v), dtype=np.float32).astype(DTYPES[case.dtype])
        keywords |= {"A_log": np.log(rng.uniform(1, 16, H_v)).astype(np.float32), "sigmoid_beta": True}
        if options.get("dt_bias", True):
            keywords["dt_bias"] = (step + np.log(-np.expm1(-step))).astype(np.float32)
    state = rng.standard_normal((S, H_v, K, V), dtype=np.float32).astype(DTYPES[case.state_dtype])
    if lengths is not None:
        keywords["cu_seqlens"] = bounds(lengths)
    spec = options.get("spec")
    if options.get("slots") or spec:
        keywords |= slots(case, rng, B)
    if spec:
        # 0 and a count past the last column are both seen in serving; both must be clamped.
        keywords["num_accepted_tokens"] = np.resize([0, spec + 2, 1, 2], B).astype(np.int32)
    return (*(drawn[name] for name in ("q", "k", "v", "g", "beta")), state), _given(keywords)


def _drawn(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    """q, k, v, g, beta, and initial_state, cu_seqlens and scale or None."""
    B, T, H_v, K, V = (case.dims[key] for key in ("B", "T", "H_v", "K", "V"))
    options, lengths = case.options, case.options.get("lengths")
    if lengths is not None and sum(lengths) + options.get("tail", 0) != T:
        raise ValueError(f"{case}: the lengths and the tail add up to {sum(lengths) + options.get('tail', 0)}")
    drawn: dict[str, Any] = _tokens(case, rng, B, T)
    if options.get("poison"):
        # Whatever stands where no token does must stay there.
        for tensor in drawn.values():
            tensor[:, sum(lengths or ()) :] = np.nan
    drawn["initial_state"] = None
    if options.get("initial"):
        n_seq = B if lengths is None else len(lengths)
        state = rng.standard_normal((n_seq, H_v, K, V), dtype=np.float32)
        drawn["initial_state"] = state.astype(DTYPES[case.state_dtype])
    drawn["cu_seqlens"] = None if lengths is None else bounds(lengths)
    drawn["scale"] = options.get("scale")
    return drawn


def _tokens(case: Case, rng: np.random.Generator, B: int, T: int) -> dict[str, np.ndarray]:
    """q, k, v, g and beta [B,T,…]."""
    H_k, H_v, K, V = (case.dims[key] for key in ("H_k", "H_v", "K", "V"))
    dtype, options = DTYPES[case.dtype], case.options
    q, k = rng.standard_normal((2, B, T, H_k, K), dtype=np.float32)
    if options.get("resembling"):
        k = rng.standard_normal((B, 1, H_k, K), dtype=np.float32) + 1e-2 * k
    if not options.get("l2norm"):
        q, k = (tensor / np.linalg.norm(tensor, axis=-1, keepdims=True) for tensor in (q, k))
    v = rng.standard_normal((B, T, H_v, V), dtype=np.float32)
    beta = 1 / (1 + np.exp(-rng.standard_normal((B, T, H_v), dtype=np.float32)))
    g = -rng.uniform(1, 16, H_v) * _step(rng, B, T, H_v)
    if options.get("slow"):
        # A state that outlives thousands of tokens: what is wrong where chunks meet stays visible.
        g = -rng.uniform(1e-3, 0.1, H_v) * _step(rng, B, T, H_v)
    if options.get("rising"):
        g = rng.uniform(-0.2, 0.1, (B, T, H_v))
    if options.get("resembling"):
        g, beta = np.full((B, T, H_v), -1e-4), np.full((B, T, H_v), 0.999)
    gates = dtype if options.get("narrow_gates") else np.float32
    return {
        "q": q.astype(dtype), "k": k.astype(dtype), "v": v.astype(dtype), "g": g.astype(gates), "beta": beta.astype(gates),
    }  # fmt: skip


def _step(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """softplus of a gate as gated delta nets initialise it, like Mamba-2: log-uniform in [1e-3, 1e-1]."""
    return np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), shape))


def _given(keywords: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if value is not None}
