"""One decode step of Mamba-2's recurrence over a pool of states, in NumPy float64.

    dt'   = softplus(dt + dt_bias)                  (each part where it is asked for)
    state = state · exp(A · dt') + dt' · x ⊗ B
    y     = (state · C + D · x) · z · sigmoid(z)    (each part where it is given)

Source: Dao and Gu, "Transformers are SSMs", 2024; the slot, varlen and speculative rules follow vLLM's operator, except
that padding rows give zeros and that indices outside their range are named as errors instead of read.
"""

from typing import Any

import numpy as np


def selective_state_update(
    state: Any,
    x,
    dt,
    A,
    B,
    C,
    *,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    state_batch_indices=None,
    dst_state_batch_indices=None,
    cu_seqlens=None,
    num_accepted_tokens=None,
    null_slot=None,
):
    """Returns (y, state) in float64; the arguments are those of the packages, in any NumPy dtype, and stay untouched.

    The stored states are not rounded to a storage dtype here: how far a rounded one may lie is the tolerance's matter.
    """
    state, x, dt, A, B, C = (np.asarray(a, np.float64) for a in (state, x, dt, A, B, C))
    D, z, dt_bias = (None if a is None else np.asarray(a, np.float64) for a in (D, z, dt_bias))
    headless = state.ndim == 3
    if headless:
        # The head-less form leaves the head axis (and the group axis) out of every argument.
        state, x, B, C = state[:, None], x[:, None], B[:, None], C[:, None]
        dt, A = dt[:, None], A[None]
        D, dt_bias = (None if a is None else a[None] for a in (D, dt_bias))
        z = None if z is None else z[:, None]
    H, P, N = state.shape[1:]
    T, G = x.shape[0], B.shape[1]
    new_state, y = state.copy(), np.zeros((T, H, P))

    # Every per-head scalar becomes a row, every per-head decay rate a tile: one recurrence serves tied and untied.
    dt = np.broadcast_to(dt if dt.ndim == 3 else dt[:, :, None], (T, H, P))
    A = np.broadcast_to(A if A.ndim == 3 else A[:, None, None], (H, P, N))
    if dt_bias is not None:
        dt = dt + (dt_bias if dt_bias.ndim == 2 else dt_bias[:, None])
    if dt_softplus:
        dt = np.logaddexp(0.0, dt)
    if D is not None:
        D = D if D.ndim == 2 else D[:, None]
    B, C = np.repeat(B, H // G, axis=1), np.repeat(C, H // G, axis=1)

    bounds = np.arange(T + 1) if cu_seqlens is None else np.asarray(cu_seqlens)
    n_seq = len(bounds) - 1
    source: Any = np.arange(n_seq) if state_batch_indices is None else np.asarray(state_batch_indices)
    target = source if dst_state_batch_indices is None else np.asarray(dst_state_batch_indices)

    def is_padding(slot):
        return slot < 0 or (null_slot is not None and slot == null_slot)

    for n in range(n_seq):
        if num_accepted_tokens is None:
            slot = source[n]
        else:
            slot = source[n, np.clip(num_accepted_tokens[n] - 1, 0, source.shape[1] - 1)]
        if is_padding(slot) or bounds[n] == bounds[n + 1]:
            continue
        h = state[slot].copy()
        for step, t in enumerate(range(bounds[n], bounds[n + 1])):
            h = h * np.exp(A * dt[t][:, :, None]) + (dt[t] * x[t])[:, :, None] * B[t][:, None, :]
            y[t] = np.einsum("hpn,hn->hp", h, C[t])
            if D is not None:
                y[t] += D * x[t]
            if z is not None:
                y[t] *= z[t] / (1 + np.exp(-z[t]))
            # Speculative decode keeps the state after every token, so that any prefix can be accepted later.
            if num_accepted_tokens is not None and step < target.shape[1] and not is_padding(target[n, step]):
                new_state[target[n, step]] = h
        if num_accepted_tokens is None and not is_padding(target[n]):
            new_state[target[n]] = h
    if headless:
        return y[:, 0], new_state[:, 0]
    return y, new_state
