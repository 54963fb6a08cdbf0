"""Mamba-2's state-space-duality scan in NumPy float64: the recurrence, and the five stages of its chunked form.

    S[t] = exp(dt[t]·A)·S[t-1] + dt[t]·x[t] ⊗ B[t]          y[t] = S[t]·C[t] + D·x[t], then · silu(z[t])

dt is softplus(dt + dt_bias) (each where asked for), clamped to dt_limit. Source: Dao and Gu, Transformers are SSMs (2024);
mamba_ssm's operators of these names.

Chunked arrays put sequence n's chunk c at slot cu_seqlens[n] // L + n + c; slots without a chunk are NaN here, because they
hold no meaning.
"""

import numpy as np

from .chunks import Chunk
from .chunks import chunks as chunks_of


def _step(dt, dt_bias, dt_softplus: bool, dt_limit) -> np.ndarray:
    dt = np.asarray(dt, np.float64)
    if dt_bias is not None:
        dt = dt + np.asarray(dt_bias, np.float64)
    if dt_softplus:
        dt = np.logaddexp(dt, 0.0)
    return np.clip(dt, *dt_limit)


def _per_head(group_tensor, H: int) -> np.ndarray:
    tensor = np.asarray(group_tensor, np.float64)
    return np.repeat(tensor, H // tensor.shape[2], axis=2)


def chunk_cumsum(dt, A, *, chunk_size, dt_bias=None, dt_softplus=False, dt_limit=(0.0, np.inf), cu_seqlens=None):
    """(dA_cumsum, dt), each [B,H,NC,L]: dt after its limits, and the cumulated dt·A of each chunk. Past a chunk's last
    token dt is 0, so that the last entry is the chunk's total."""
    B, T, H = dt.shape
    step = _step(dt, dt_bias, dt_softplus, dt_limit)
    NC, chunks = chunks_of(B, T, chunk_size, cu_seqlens)
    out = np.full((B, H, NC, chunk_size), np.nan)
    for chunk in chunks:
        out[chunk.b, :, chunk.slot] = 0
        out[chunk.b, :, chunk.slot, : chunk.end - chunk.begin] = step[chunk.b, chunk.begin : chunk.end].T
    return np.cumsum(out * np.asarray(A, np.float64)[:, None, None], axis=-1), out


def chunk_state(x, B, dt, dA_cumsum, *, cu_seqlens=None):
    """[B,NC,H,P,N]: the state that each chunk leaves when it starts from zero."""
    batch, T, H, P = x.shape
    Bh, x = _per_head(B, H), x.astype(np.float64)
    NC, chunks = chunks_of(batch, T, dA_cumsum.shape[-1], cu_seqlens)
    states = np.full((batch, NC, H, P, Bh.shape[-1]), np.nan)
    for b, slot, begin, end, *_ in chunks:
        n, a = end - begin, dA_cumsum[b, :, slot].astype(np.float64)
        weight = np.exp(a[:, -1:] - a[:, :n]) * dt[b, :, slot, :n]
        states[b, slot] = np.einsum("hj,jhp,jhn->hpn", weight, x[b, begin:end], Bh[b, begin:end], optimize=True)
    return states


def state_passing(states, dA_cumsum, *, initial_states=None, state_dtype=None, cu_seqlens=None):
    """(the state before each chunk [B,NC,H,P,N], the last state of each sequence [N_seq,H,P,N]); dtypes are the tolerance's."""
    del state_dtype
    B, NC, H, P, N = states.shape
    L = dA_cumsum.shape[-1]
    # Dense or packed, the chunks of a sequence are neighbours; how many tokens they have does not matter here.
    T = NC * L if cu_seqlens is None else int(cu_seqlens[-1])
    _, chunks = chunks_of(B, T, L, cu_seqlens)
    n_seq = B if cu_seqlens is None else len(cu_seqlens) - 1
    carry = np.zeros((n_seq, H, P, N)) if initial_states is None else initial_states.astype(np.float64)
    before = np.full(states.shape, np.nan)
    for chunk in chunks:
        before[chunk.b, chunk.slot] = carry[chunk.sequence]
        decay = np.exp(dA_cumsum[chunk.b, :, chunk.slot, -1].astype(np.float64))
        carry[chunk.sequence] = carry[chunk.sequence] * decay[:, None, None] + states[chunk.b, chunk.slot]
    return before, carry


def bmm_chunk(C, B, *, chunk_size, cu_seqlens=None):
    """[B,NC,G,L,L]: C[i]·B[j] of each chunk's tokens i and j, zero past its last token."""
    batch, T, G, _ = C.shape
    NC, chunks = chunks_of(batch, T, chunk_size, cu_seqlens)
    out = np.full((batch, NC, G, chunk_size, chunk_size), np.nan)
    for b, slot, begin, end, *_ in chunks:
        n = end - begin
        out[b, slot] = 0
        c, k = (tensor[b, begin:end].astype(np.float64) for tensor in (C, B))
        out[b, slot, :, :n, :n] = np.einsum("ign,jgn->gij", c, k, optimize=True)
    return out


def chunk_scan(CB, x, dt, dA_cumsum, C, states, *, D=None, z=None, cu_seqlens=None):
    """y [B,T,H,P] from the state before each chunk and the products within it."""
    batch, T, H, _ = x.shape
    G = CB.shape[2]
    Ch, x64 = _per_head(C, H), x.astype(np.float64)
    y = np.zeros(x.shape)
    live = np.zeros((batch, T), bool)
    for b, slot, begin, end, *_ in chunks_of(batch, T, dA_cumsum.shape[-1], cu_seqlens)[1]:
        n, a = end - begin, dA_cumsum[b, :, slot, : end - begin].astype(np.float64)
        decay = np.exp(np.minimum(a[:, :, None] - a[:, None, :], 0)) * dt[b, :, slot, None, :n]
        scores = np.repeat(CB[b, slot, :, :n, :n].astype(np.float64), H // G, axis=0) * decay
        y[b, begin:end] = np.einsum("hij,jhp->ihp", np.tril(scores), x64[b, begin:end], optimize=True)
        carried = np.einsum("ihn,hpn->ihp", Ch[b, begin:end], states[b, slot].astype(np.float64), optimize=True)
        y[b, begin:end] += carried * np.exp(a).T[:, :, None]
        live[b, begin:end] = True
    return _finish(y, x64, D, z, live)


def mamba_chunk_scan_combined(
    x, dt, A, B, C, *, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, np.inf),
    initial_states=None, cu_seqlens=None, return_intermediate_states=False, chunk_aligned=False,
):  # fmt: skip
    """(y [B,T,H,P], final states [N_seq,H,P,N][, the state after each chunk [B,NC,H,P,N]]), token by token."""
    batch, T, H = dt.shape
    NC, chunks = chunks_of(batch, T, chunk_size, cu_seqlens)
    if chunk_aligned:
        x, B, C = (_unaligned(tensor, T, chunk_size, chunks) for tensor in (x, B, C))
    P, N = x.shape[-1], B.shape[-1]
    step = _step(dt, dt_bias, dt_softplus, dt_limit)
    A, Bh, Ch, x64 = np.asarray(A, np.float64), _per_head(B, H), _per_head(C, H), x.astype(np.float64)
    n_seq = batch if cu_seqlens is None else len(cu_seqlens) - 1
    final = np.zeros((n_seq, H, P, N)) if initial_states is None else initial_states.astype(np.float64)
    ends = np.full((batch, NC, H, P, N), np.nan) if return_intermediate_states else None
    y, live = np.zeros(x.shape), np.zeros((batch, T), bool)
    for chunk in chunks:
        S = final[chunk.sequence]
        for t in range(chunk.begin, chunk.end):
            now = step[chunk.b, t]
            S *= np.exp(now * A)[:, None, None]
            S += (now[:, None] * x64[chunk.b, t])[:, :, None] * Bh[chunk.b, t][:, None, :]
            y[chunk.b, t] = np.matmul(S, Ch[chunk.b, t][:, :, None])[..., 0]
        live[chunk.b, chunk.begin : chunk.end] = True
        if ends is not None:
            ends[chunk.b, chunk.slot] = S
    y = _finish(y, x64, D, z, live)
    return (y, final) if ends is None else (y, final, ends)


def mamba_chunk_scan_by_stages(
    x, dt, A, B, C, *, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, np.inf),
    initial_states=None, cu_seqlens=None, return_intermediate_states=False, chunk_aligned=False,
):  # fmt: skip
    """`mamba_chunk_scan_combined` as the stages have it: equal up to float64's rounding, and quick enough for models' sizes."""
    if chunk_aligned:
        chunks = chunks_of(dt.shape[0], dt.shape[1], chunk_size, cu_seqlens)[1]
        x, B, C = (_unaligned(tensor, dt.shape[1], chunk_size, chunks) for tensor in (x, B, C))
    # Intermediate states belong to the caller's chunks; without them shorter ones are less work.
    L = chunk_size if return_intermediate_states else min(chunk_size, 64)
    packed = {"cu_seqlens": cu_seqlens}
    dA_cumsum, step = chunk_cumsum(
        dt, A, chunk_size=L, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, **packed
    )
    states = chunk_state(x, B, step, dA_cumsum, **packed)
    before, final = state_passing(states, dA_cumsum, initial_states=initial_states, **packed)
    y = chunk_scan(bmm_chunk(C, B, chunk_size=L, **packed), x, step, dA_cumsum, C, before, D=D, z=z, **packed)
    if not return_intermediate_states:
        return y, final
    return y, final, before * np.exp(dA_cumsum[..., -1]).transpose(0, 2, 1)[..., None, None] + states


def _finish(y, x, D, z, live) -> np.ndarray:
    if D is not None:
        D = np.asarray(D, np.float64)
        y = y + x * (D if D.ndim == 2 else D[:, None])
    if z is not None:
        z = np.asarray(z, np.float64)
        y = y * z / (1 + np.exp(-z))
    return np.where(live[:, :, None, None], y, 0.0)


def _unaligned(tensor: np.ndarray, T: int, L: int, chunks: list[Chunk]) -> np.ndarray:
    """Tokens at their own rows again, from sequences that begin at whole chunks."""
    rows = np.zeros((tensor.shape[0], T, *tensor.shape[2:]), tensor.dtype)
    for chunk in chunks:
        first = chunk.slot * L
        rows[chunk.b, chunk.begin : chunk.end] = tensor[chunk.b, first : first + chunk.end - chunk.begin]
    return rows
