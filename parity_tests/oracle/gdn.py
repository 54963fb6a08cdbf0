"""The gated delta rule in NumPy float64: the recurrence, the six stages of its chunked form, and its decode form.

    S[t] = exp(g[t])·S[t-1] + k[t] ⊗ beta[t]·(v[t] - (exp(g[t])·S[t-1])ᵀ·k[t])          o[t] = scale·S[t]ᵀ·q[t]

S is [K,V]; value head h reads query and key head h // (H_v // H_k). Source: Yang, Kautz and Hatamizadeh, Gated Delta Networks
(2024); FLA's operators of these names.

Slots without a chunk (see `chunks`) and rows without a token where those have no meaning are NaN.
"""

import itertools
from typing import Any

import numpy as np

from .chunks import chunks


def _per_value_head(tensor, H_v: int) -> np.ndarray:
    tensor = np.asarray(tensor, np.float64)
    return np.repeat(tensor, H_v // tensor.shape[2], axis=2)


def _l2norm(tensor: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    return tensor / np.sqrt(np.square(tensor).sum(-1, keepdims=True) + eps)


def _gate_decay(g, b: int, begin: int, end: int, base: float = np.e) -> Any:
    """base^(g_i - g_j) for i >= j, zero above: [H_v,n,n]; ones where there is no gate."""
    n = end - begin
    if g is None:
        return np.tril(np.ones((1, n, n)))
    gate = np.asarray(g[b, begin:end], np.float64).T
    difference = np.where(np.tri(n, dtype=bool), gate[:, :, None] - gate[:, None, :], -np.inf)
    return np.power(base, difference)


def chunk_local_cumsum(g, *, chunk_size=64, cu_seqlens=None):
    """[B,T,H_v]: g summed up from each chunk's first token; zero where no token is."""
    B, T, _ = g.shape
    out = np.zeros(g.shape)
    for b, _, begin, end, _ in chunks(B, T, chunk_size, cu_seqlens)[1]:
        out[b, begin:end] = np.cumsum(np.asarray(g[b, begin:end], np.float64), axis=0)
    return out


def chunk_scaled_dot_kkt(k, beta, *, g=None, chunk_size=64, cu_seqlens=None):
    """[B,T,H_v,BT]: beta_i·(k_i·k_j)·exp(g_i - g_j) for j < i of i's chunk, else zero."""
    B, T, H_v = beta.shape
    kh = _per_value_head(k, H_v)
    out = np.zeros((B, T, H_v, chunk_size))
    for b, _, begin, end, _ in chunks(B, T, chunk_size, cu_seqlens)[1]:
        n = end - begin
        products = np.einsum("ihd,jhd->hij", kh[b, begin:end], kh[b, begin:end], optimize=True)
        products = products * _gate_decay(g, b, begin, end) * beta[b, begin:end].astype(np.float64).T[:, :, None]
        out[b, begin:end, :, :n] = np.tril(products, -1).transpose(1, 0, 2)
    return out


def solve_tril(A, *, cu_seqlens=None):
    """[B,T,H_v,BT]: (I + A)^-1 of each chunk's strictly lower triangle; zero where no token is."""
    B, T, _, L = A.shape
    out = np.zeros(A.shape)
    for b, _, begin, end, _ in chunks(B, T, L, cu_seqlens)[1]:
        n = end - begin
        triangle = np.tril(A[b, begin:end, :, :n].astype(np.float64).transpose(1, 0, 2), -1)
        out[b, begin:end, :, :n] = np.linalg.inv(np.eye(n) + triangle).transpose(1, 0, 2)
    return out


def recompute_w_u(k, v, beta, A, *, g=None, cu_seqlens=None):
    """w = A·(beta·exp(g)·k) [B,T,H_v,K] and u = A·(beta·v) [B,T,H_v,V], A the inverse of `solve_tril`."""
    B, T, H_v, _ = v.shape
    beta = beta.astype(np.float64)
    kh = _per_value_head(k, H_v) * (beta if g is None else beta * np.exp(g.astype(np.float64)))[..., None]
    vb = v.astype(np.float64) * beta[..., None]
    w, u = np.zeros(kh.shape), np.zeros(v.shape)
    for b, _, begin, end, _ in chunks(B, T, A.shape[-1], cu_seqlens)[1]:
        inverse = A[b, begin:end, :, : end - begin].astype(np.float64)
        w[b, begin:end] = np.einsum("ihj,jhd->ihd", inverse, kh[b, begin:end], optimize=True)
        u[b, begin:end] = np.einsum("ihj,jhd->ihd", inverse, vb[b, begin:end], optimize=True)
    return w, u


def chunk_delta_h(k, w, u, *, g=None, initial_state=None, chunk_size=64, cu_seqlens=None):
    """(h [B,NC,H_v,K,V], the state before each chunk; v_new = u - w·h [B,T,H_v,V]; the last states [N_seq,H_v,K,V])."""
    B, T, H_v, V = u.shape
    kh, w, u = _per_value_head(k, H_v), w.astype(np.float64), u.astype(np.float64)
    NC, found = chunks(B, T, chunk_size, cu_seqlens)
    n_seq = B if cu_seqlens is None else len(cu_seqlens) - 1
    final = np.zeros((n_seq, H_v, kh.shape[-1], V)) if initial_state is None else initial_state.astype(np.float64)
    h, v_new = np.full((B, NC, H_v, kh.shape[-1], V), np.nan), np.zeros(u.shape)
    for b, slot, begin, end, n in found:
        h[b, slot] = final[n]
        fresh = u[b, begin:end] - np.einsum("ihd,hdv->ihv", w[b, begin:end], final[n], optimize=True)
        v_new[b, begin:end] = fresh
        if g is not None:
            gate = g[b, begin:end].astype(np.float64)
            fresh = fresh * np.exp(gate[-1] - gate)[..., None]
            final[n] *= np.exp(gate[-1])[:, None, None]
        final[n] += np.einsum("ihd,ihv->hdv", kh[b, begin:end], fresh, optimize=True)
    return h, v_new, final


def chunk_o(
    q, k, v, h, *, g=None, gate_base="e", scale=None, chunk_size=64, state_layout="KV", cu_seqlens=None
):  # fmt: skip
    """o [B,T,H_v,V] = scale·(base^g_i·q_i·h + Σ_{j<=i} (q_i·k_j)·base^(g_i - g_j)·v_j), v the v_new of `chunk_delta_h`."""
    B, T, H_v, _ = v.shape
    qh, kh, v = _per_value_head(q, H_v), _per_value_head(k, H_v), v.astype(np.float64)
    base = {"e": np.e, "2": 2.0}[gate_base]
    o = np.zeros(v.shape)
    for b, slot, begin, end, _ in chunks(B, T, chunk_size, cu_seqlens)[1]:
        state = h[b, slot].astype(np.float64)
        if state_layout == "VK":
            state = state.transpose(0, 2, 1)
        carried = np.einsum("ihd,hdv->ihv", qh[b, begin:end], state, optimize=True)
        if g is not None:
            carried *= np.power(base, g[b, begin:end].astype(np.float64))[..., None]
        products = np.einsum("ihd,jhd->hij", qh[b, begin:end], kh[b, begin:end], optimize=True)
        products = np.tril(products * _gate_decay(g, b, begin, end, base))
        o[b, begin:end] = carried + np.einsum("hij,jhv->ihv", products, v[b, begin:end], optimize=True)
    return o * (q.shape[-1] ** -0.5 if scale is None else scale)


def chunk_gated_delta_rule(
    q, k, v, g, beta, *, scale=None, initial_state=None, cu_seqlens=None, use_qk_l2norm=False, chunk_size=64
):  # fmt: skip
    """(o [B,T,H_v,V], the last states [N_seq,H_v,K,V]), token by token."""
    del chunk_size  # how it is computed is no part of what it is
    B, T, H_v, V = v.shape
    qh, kh = _per_value_head(q, H_v), _per_value_head(k, H_v)
    if use_qk_l2norm:
        qh, kh = _l2norm(qh), _l2norm(kh)
    v, g, beta = (tensor.astype(np.float64) for tensor in (v, g, beta))
    bounds = [(b, 0, T) for b in range(B)]
    if cu_seqlens is not None:
        bounds = [(0, int(begin), int(end)) for begin, end in itertools.pairwise(cu_seqlens)]
    K = kh.shape[-1]
    final = np.zeros((len(bounds), H_v, K, V)) if initial_state is None else initial_state.astype(np.float64)
    o = np.zeros(v.shape)
    for S, (b, begin, end) in zip(final, bounds, strict=True):
        for t in range(begin, end):
            S *= np.exp(g[b, t])[:, None, None]
            fresh = beta[b, t][:, None] * (v[b, t] - np.einsum("hdv,hd->hv", S, kh[b, t]))
            S += kh[b, t][:, :, None] * fresh[:, None, :]
            o[b, t] = np.einsum("hdv,hd->hv", S, qh[b, t])
    return o * (K**-0.5 if scale is None else scale), final


def chunk_gated_delta_rule_by_stages(
    q, k, v, g, beta, *, scale=None, initial_state=None, cu_seqlens=None, use_qk_l2norm=False, chunk_size=64
):  # fmt: skip
    """`chunk_gated_delta_rule` as the stages have it: equal up to float64's rounding, and quick enough for models' sizes."""
    if use_qk_l2norm:
        q, k = (_l2norm(tensor.astype(np.float64)) for tensor in (q, k))
    packed: dict[str, Any] = {"cu_seqlens": cu_seqlens}
    gate = chunk_local_cumsum(g, chunk_size=chunk_size, **packed)
    A = solve_tril(chunk_scaled_dot_kkt(k, beta, g=gate, chunk_size=chunk_size, **packed), **packed)
    w, u = recompute_w_u(k, v, beta, A, g=gate, **packed)
    h, v_new, final = chunk_delta_h(k, w, u, g=gate, initial_state=initial_state, chunk_size=chunk_size, **packed)
    return chunk_o(q, k, v_new, h, g=gate, scale=scale, chunk_size=chunk_size, **packed), final


def fused_recurrent_gated_delta_rule(
    q, k, v, g, beta, state, *, scale=None, A_log=None, dt_bias=None, sigmoid_beta=False, use_qk_l2norm=False,
    state_indices=None, dst_state_indices=None, cu_seqlens=None, num_accepted_tokens=None, null_slot=None,
):  # fmt: skip
    """(o [T,H_v,V], state): q, k [T,H_k,K], a pool of states [S,H_v,K,V], slots as in `selective_state_update`.

    With A_log, g is the raw gate: -exp(A_log)·softplus(g + dt_bias). The stored states are not rounded here.
    """
    T, H_v = v.shape[:2]
    qh, kh = _per_value_head(q[None], H_v)[0], _per_value_head(k[None], H_v)[0]
    if use_qk_l2norm:
        qh, kh = _l2norm(qh), _l2norm(kh)
    v, g, beta, state = (np.array(tensor, np.float64) for tensor in (v, g, beta, state))
    if A_log is not None:
        raw = g if dt_bias is None else g + np.asarray(dt_bias, np.float64)
        g = -np.exp(np.asarray(A_log, np.float64)) * np.logaddexp(0.0, raw)
    if sigmoid_beta:
        beta = 1 / (1 + np.exp(-beta))
    new_state, o = state.copy(), np.zeros(v.shape)

    bounds = np.arange(T + 1) if cu_seqlens is None else np.asarray(cu_seqlens)
    n_seq = len(bounds) - 1
    source: Any = np.arange(n_seq) if state_indices is None else np.asarray(state_indices)
    target = source if dst_state_indices is None else np.asarray(dst_state_indices)

    def is_padding(slot):
        return slot < 0 or (null_slot is not None and slot == null_slot)

    for n in range(n_seq):
        slot = source[n]
        if num_accepted_tokens is not None:
            slot = source[n, np.clip(num_accepted_tokens[n] - 1, 0, source.shape[1] - 1)]
        if is_padding(slot) or bounds[n] == bounds[n + 1]:
            continue
        S = state[slot].copy()
        for step, t in enumerate(range(bounds[n], bounds[n + 1])):
            S *= np.exp(g[t])[:, None, None]
            fresh = beta[t][:, None] * (v[t] - np.einsum("hdv,hd->hv", S, kh[t]))
            S += kh[t][:, :, None] * fresh[:, None, :]
            o[t] = np.einsum("hdv,hd->hv", S, qh[t])
            # Speculative decode keeps the state after every token, so that any prefix can be accepted later.
            if num_accepted_tokens is not None and step < target.shape[1] and not is_padding(target[n, step]):
                new_state[target[n, step]] = S
        if num_accepted_tokens is None and not is_padding(target[n]):
            new_state[target[n]] = S
    return o * (q.shape[-1] ** -0.5 if scale is None else scale), new_state
