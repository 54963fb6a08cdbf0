"""The short depthwise causal convolution before every Mamba-2 and gated-delta-net layer, in NumPy float64.

    y[t] = act(bias + Σ_j weight[:, j] · x[t - (W - 1) + j])        j = 0 … W - 1

where x[-1], x[-2], … of a sequence are its state's last rows, the inputs before it (zeros without a state). Depthwise:
every channel on its own. The state that comes out is the last W - 1 inputs, copied bit for bit.

Source: the causal-conv1d library of Dao; slot, packed and speculative rules follow vLLM's operators of these names, except
that padding rows give zeros and that what is accepted is clamped to what the state holds.
"""

import itertools
from typing import Any

import numpy as np


def _activate(y: np.ndarray, activation: str | None) -> np.ndarray:
    return y if activation is None else y / (1 + np.exp(-y))


def _convolve(history: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: Any) -> np.ndarray:
    """[T,D] float64 from history [W-1,D] and x [T,D]."""
    window = np.concatenate([history, x]).astype(np.float64)
    taps = weight.astype(np.float64)
    y = np.zeros(x.shape, np.float64) if bias is None else np.broadcast_to(bias.astype(np.float64), x.shape).copy()
    for j in range(taps.shape[1]):
        y += taps[:, j] * window[j : j + len(x)]
    return y


def causal_conv1d(
    x, weight, *, bias=None, activation=None, initial_state=None, cu_seqlens=None, conv_state=None, state_indices: Any = None,
    has_initial_state: Any = None, null_slot=None,
):  # fmt: skip
    """(y [B,T,D] float64, final states): final_state [N_seq,W-1,D], or with a pool the new pool, both in x's dtype.

    With a pool, sequence n starts from the first W - 1 rows of slot state_indices[n] where has_initial_state[n], else from
    zeros, and leaves its last inputs there. A padding slot gives zero rows. A sequence without tokens keeps its state.
    """
    B, T, D = x.shape
    W = weight.shape[1]
    y = np.zeros(x.shape)
    if cu_seqlens is None:
        sequences = [(b, 0, T) for b in range(B)]
    else:
        sequences = [(0, begin, end) for begin, end in itertools.pairwise(cu_seqlens)]
    final = np.zeros((len(sequences), W - 1, D), x.dtype) if conv_state is None else conv_state.copy()
    for n, (b, begin, end) in enumerate(sequences):
        slot, history = n, np.zeros((W - 1, D), x.dtype)
        if conv_state is None:
            if initial_state is not None:
                history = initial_state[n]
        else:
            slot = state_indices[n]
            if slot < 0 or slot == null_slot or begin == end:
                continue
            if has_initial_state[n]:
                history = conv_state[slot, : W - 1]
        tokens = x[b, begin:end]
        y[b, begin:end] = _activate(_convolve(history, tokens, weight, bias), activation)
        final[slot, : W - 1] = np.concatenate([history, tokens])[len(tokens) :]
    return y, final


def causal_conv1d_split(x, weight, sizes, *, chunk_size=None, cu_seqlens=None, **others):
    """((part [B,rows,size] float64, …), final states): y split along the channels and, with chunk_size L, along aligned rows.

    Aligned: dense, T is padded to a multiple of L; packed, sequence n starts at row L·(cu_seqlens[n] // L + n) of
    L·(T // L + N_seq) rows, which needs no sum over lengths and always leaves room. Rows that hold no token are zero.
    """
    y, final = causal_conv1d(x, weight, cu_seqlens=cu_seqlens, **others)
    B, T, D = x.shape
    if chunk_size is not None:
        if cu_seqlens is None:
            aligned = np.zeros((B, -(-T // chunk_size) * chunk_size, D))
            aligned[:, :T] = y
        else:
            aligned = np.zeros((1, chunk_size * (T // chunk_size + len(cu_seqlens) - 1), D))
            for n, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
                row = chunk_size * (begin // chunk_size + n)
                aligned[0, row : row + end - begin] = y[0, begin:end]
        y = aligned
    return tuple(np.split(y, np.cumsum(sizes)[:-1], axis=2)), final


def causal_conv1d_update(
    x, conv_state, weight, *, bias=None, activation=None, conv_state_indices=None, cu_seqlens=None,
    num_accepted_tokens=None, null_slot=None,
):  # fmt: skip
    """(y [T,D] float64, new conv_state [S,L,D]): a few tokens onto each sequence's state.

    Plain: history is rows 0 … W - 2 of the slot, which becomes the last W - 1 inputs.
    Speculative (num_accepted_tokens): the last call left W - 2 older rows and then its tokens, of which the first a were
    accepted (clamped to 1 … L - W + 2): history is rows a - 1 … a + W - 3. This call leaves the history without its first
    row, then its own tokens as far as the L rows go; rows past them keep what they held.
    """
    T, W = x.shape[0], weight.shape[1]
    L = conv_state.shape[1]
    bounds = np.arange(T + 1) if cu_seqlens is None else cu_seqlens
    new_state, y = conv_state.copy(), np.zeros(x.shape)
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        slot = n if conv_state_indices is None else conv_state_indices[n]
        if slot < 0 or slot == null_slot or begin == end:
            continue
        tokens = x[begin:end]
        first = 0 if num_accepted_tokens is None else int(np.clip(num_accepted_tokens[n] - 1, 0, L - (W - 1)))
        history = conv_state[slot, first : first + W - 1]
        y[begin:end] = _activate(_convolve(history, tokens, weight, bias), activation)
        if num_accepted_tokens is None:
            new_state[slot, : W - 1] = np.concatenate([history, tokens])[-(W - 1) :]
        else:
            kept = np.concatenate([history[1:], tokens])[:L]
            new_state[slot, : len(kept)] = kept
    return y, new_state
