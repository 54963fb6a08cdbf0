"""`causal_conv1d` and `causal_conv1d_update` in plain JAX: for any device and shape, and what gradients are taken of.

No loop: a row of y is W shifted rows. Packed, the first W - 1 rows of each sequence, which look at its initial state, are
computed apart and put in place.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._activations_xla import silu
from ._causal_conv1d_call import Floats, Integers, Static


class Sequences(NamedTuple):
    """Where each sequence is and what it starts from."""

    begin: jax.Array
    """[N_seq]"""
    length: jax.Array
    """[N_seq]"""
    history: jax.Array
    """[N_seq,W-1,D] in x's dtype."""
    padding: jax.Array
    """[N_seq]: its rows of y are zero."""
    live: jax.Array
    """[N_seq]: its slot is within the pool. Where not, and not padding, its rows are NaN."""


def prefill(static: Static, floats: Floats, integers: Integers) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """(parts of y, final state)."""
    dims = static.dims
    history, slot, padding, live = _initial(static, floats, integers)
    if dims.packed:
        begin, length = _bounds(integers.cu_seqlens, dims.T)
        sequences = Sequences(begin, length, history, padding, live)
        y = _packed(static, floats, sequences)[None]
        last = _last_inputs(floats.x[0], sequences)
    else:
        length = jnp.full(dims.B, dims.T, jnp.int32)
        used = (live & ~padding)[:, None, None]
        # What a padding row holds must not reach a gradient, not even as 0 · NaN.
        window = jnp.concatenate([history, jnp.where(used, floats.x, 0)], axis=1)
        y = _mark(_convolve(static, floats, window, dims.T), padding[:, None, None], used)
        last = window[:, dims.T :]
    if static.pool:
        assert floats.state is not None
        target = jnp.where(live & ~padding & (length > 0), slot, dims.S)
        last = floats.state.at[target, : dims.W - 1].set(last, mode="drop")
    y = _align(static, y.astype(floats.x.dtype), integers.cu_seqlens)
    return tuple(y[..., at : at + size] for at, size in zip(static.offsets, static.sizes, strict=True)), last


def update(static: Static, floats: Floats, integers: Integers) -> tuple[jax.Array, jax.Array]:
    """(y, new pool)."""
    dims = static.dims
    S, T, L, H = dims.S, dims.T, dims.L, dims.W - 1
    assert floats.state is not None
    if T == 0 or dims.N_seq == 0 or S == 0:
        return jnp.zeros_like(floats.x), floats.state
    if dims.packed:
        begin, length = _bounds(integers.cu_seqlens, T)
    else:
        begin, length = jnp.arange(T, dtype=jnp.int32), jnp.ones(T, jnp.int32)
    slot, padding, live = _slots(static, integers.slots)
    source = jnp.where(live & ~padding, slot, 0)
    row = jnp.arange(L, dtype=jnp.int32)
    first = jnp.zeros((dims.N_seq, 1), jnp.int32)
    if integers.accepted is not None:
        first = jnp.clip(integers.accepted - 1, 0, L - H)[:, None]
    before = jnp.take_along_axis(floats.state[source], (first + row[:H])[..., None], axis=1)
    before = jnp.where((live & ~padding)[:, None, None], before, 0)
    sequences = Sequences(begin, length, before, padding, live)
    if dims.packed:
        y = _packed(static, floats, sequences)
    else:
        used = (live & ~padding)[:, None]
        window = jnp.concatenate([before, jnp.where(used, floats.x, 0)[:, None]], axis=1)
        y = _mark(_convolve(static, floats, window, 1)[:, 0], padding[:, None], used)
    y = y.astype(floats.x.dtype)

    target = jnp.where(live & ~padding & (length > 0), slot, S)[:, None]
    if integers.accepted is None:
        rows = jnp.broadcast_to(row[:H], (dims.N_seq, H))
        kept = _last_inputs(floats.x, sequences)
    else:
        # The history without its first row, then the tokens, as far as the slot has rows.
        rows = jnp.where(row < length[:, None] + H - 1, row, L)
        kept = _inputs(floats.x, sequences, jnp.broadcast_to(row + 1, (dims.N_seq, L)))
    return y, floats.state.at[target, rows].set(kept, mode="drop")


def _bounds(cu_seqlens: jax.Array | None, T: int) -> tuple[jax.Array, jax.Array]:
    """(begin, length) of every sequence, within the T tokens whatever cu_seqlens holds; the first begins at 0."""
    assert cu_seqlens is not None
    bounds = jnp.clip(cu_seqlens, 0, T).at[0].set(0)
    return bounds[:-1], jnp.maximum(bounds[1:] - bounds[:-1], 0)


def _slots(static: Static, slots: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(slot, padding, live), [N_seq] each."""
    dims = static.dims
    if slots is None:
        slot = jnp.arange(dims.N_seq, dtype=jnp.int32)
        return slot, jnp.zeros(dims.N_seq, bool), jnp.ones(dims.N_seq, bool)
    return slots, static.is_padding(slots), slots < dims.S


def _initial(static: Static, floats: Floats, integers: Integers) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(history, slot, padding, live) of every sequence."""
    dims = static.dims
    N_seq, H = dims.N_seq, dims.W - 1
    slot, padding, live = _slots(static, integers.slots)
    zeros = jnp.zeros((N_seq, H, dims.D), floats.x.dtype)
    if floats.state is None or (static.pool and dims.S == 0):
        return zeros, slot, padding, live
    if not static.pool:
        return floats.state, slot, padding, live
    assert integers.has_initial is not None
    has = live & ~padding & integers.has_initial
    history = jnp.where(has[:, None, None], floats.state[jnp.where(has, slot, 0), :H], zeros)
    return history, slot, padding, live


def _convolve(static: Static, floats: Floats, window: jax.Array, count: int) -> jax.Array:
    """[..., count, D] in fp32 from [..., W - 1 + count, D]."""
    return _sum(static, floats, [window[..., j : j + count, :] for j in range(static.dims.W)])


def _sum(static: Static, floats: Floats, rows: Sequence[jax.Array]) -> jax.Array:
    """bias + Σ_j weight[:, j] · rows[j] in fp32, activated."""
    taps = floats.weight.astype(jnp.float32)
    y = None if floats.bias is None else floats.bias.astype(jnp.float32)
    for j, x in enumerate(rows):
        product = taps[:, j] * x.astype(jnp.float32)
        y = product if y is None else y + product
    assert y is not None
    return silu(y) if static.silu else y


def _packed(static: Static, floats: Floats, sequences: Sequences) -> jax.Array:
    """[T,D] in fp32; zero and NaN where they belong."""
    dims = static.dims
    T, H = dims.T, dims.W - 1
    x = floats.x[0] if floats.x.ndim == 3 else floats.x
    if T == 0 or dims.N_seq == 0:
        return jnp.zeros(x.shape, jnp.float32)
    begin, length, history, padding, live = sequences
    token = jnp.arange(T, dtype=jnp.int32)
    n = jnp.minimum(jnp.searchsorted(begin + length, token, side="right"), dims.N_seq - 1)
    place = token - begin[n]
    inside = (place >= 0) & (place < length[n])
    x = jnp.where((inside & live[n] & ~padding[n])[:, None], x, 0)
    shifted = jnp.concatenate([jnp.zeros((H, x.shape[1]), x.dtype), x])
    rows = [jnp.where((place >= H - j)[:, None], shifted[j : j + T], 0) for j in range(dims.W)]
    y = _sum(static, floats, rows)

    at = begin[:, None] + jnp.arange(H, dtype=jnp.int32)
    head = at < (begin + length)[:, None]
    tokens = jnp.where(head[..., None], x[jnp.where(head, at, 0)], 0)
    heads = _convolve(static, floats, jnp.concatenate([history, tokens], axis=1), H)
    y = y.at[jnp.where(head, at, T)].set(heads, mode="drop")
    return _mark(y, (padding[n] | ~inside)[:, None], live[n][:, None])


def _mark(y: jax.Array, padding: jax.Array, good: jax.Array) -> jax.Array:
    """Zero for padding, NaN for what would lie past the end of the pool."""
    # NaN nowhere else, not even on the way: `jax.debug_nans` would see it.
    return jnp.where(good | padding, jnp.where(padding, 0.0, y), jnp.nan)


def _inputs(x: jax.Array, sequences: Sequences, row: jax.Array) -> jax.Array:
    """[N_seq,R,D]: for each sequence the rows [N_seq,R] of its history with its tokens behind."""
    H = sequences.history.shape[1]
    before = jnp.take_along_axis(sequences.history, jnp.minimum(row, H - 1)[..., None], axis=1)
    if x.shape[0] == 0:
        return before
    token = jnp.clip(sequences.begin[:, None] + row - H, 0, x.shape[0] - 1)
    return jnp.where((row < H)[..., None], before, x[token])


def _last_inputs(x: jax.Array, sequences: Sequences) -> jax.Array:
    H = sequences.history.shape[1]
    return _inputs(x, sequences, sequences.length[:, None] + jnp.arange(H, dtype=jnp.int32))


def _align(static: Static, y: jax.Array, cu_seqlens: jax.Array | None) -> jax.Array:
    """y with its sequences' first rows at multiples of chunk_size, and zeros between."""
    dims, L = static.dims, static.chunk_size
    if L is None:
        return y
    if not dims.packed:
        return jnp.pad(y, ((0, 0), (0, dims.rows - dims.T), (0, 0)))
    if dims.T == 0 or dims.N_seq == 0:
        return jnp.zeros((1, dims.rows, dims.D), y.dtype)
    begin, length = _bounds(cu_seqlens, dims.T)
    start = L * (begin // L + jnp.arange(dims.N_seq, dtype=jnp.int32))
    row = jnp.arange(dims.rows, dtype=jnp.int32)
    n = jnp.searchsorted(start, row, side="right") - 1
    place = row - start[n]
    there = place < length[n]
    return jnp.where(there[:, None], y[:, jnp.where(there, begin[n] + place, 0)], 0)
