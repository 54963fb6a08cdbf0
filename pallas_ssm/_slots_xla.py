"""A recurrence over a pool of states in plain JAX, for any device and shape: what the decode operators have in common.

Sequences have one token each, or several (`cu_seqlens`); a sequence's state comes from a slot and goes to one, in speculative
decode after every token. Padding, slots past the pool's end and repeated bounds are as `selective_state_update` documents.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from ._carries_xla import vary_alike

Result = tuple[jax.Array, jax.Array]
Rows = Mapping[str, jax.Array]


class Sizes(Protocol):
    @property
    def S(self) -> int: ...
    @property
    def T(self) -> int: ...
    @property
    def N_seq(self) -> int: ...
    @property
    def T_max(self) -> int: ...


class Indices(Protocol):
    """int32, or None where a call has none."""

    @property
    def source(self) -> Any: ...
    @property
    def target(self) -> Any: ...
    @property
    def cu_seqlens(self) -> Any: ...
    @property
    def accepted(self) -> Any: ...


class Recurrence(NamedTuple):
    dims: Sizes
    indices: Indices
    is_padding: Callable[[jax.Array], jax.Array]
    """Of slots."""
    rows: Rows
    """What each token has, [T,…]."""
    weights: Any
    """What `step` has besides."""
    state: jax.Array
    """The pool, [S,…]."""
    y: jax.Array
    """An array of the outputs' shape and dtype."""
    step: Callable[[jax.Array, Rows], Result]
    """(y, state) in fp32 of one token for each of n sequences, from fp32 states [n,…] and the tokens' rows."""
    stored: Callable[[jax.Array, jax.Array], jax.Array]
    """States in the pool's dtype; given the slots, too."""


class _Plan(NamedTuple):
    """Where each sequence's tokens and states are. [N_seq] unless said otherwise."""

    begin: jax.Array
    length: jax.Array
    padding: jax.Array
    """The sequence's rows of y are zero."""
    live: jax.Array
    """Its slots are within the pool; otherwise, and where it is not padding, its rows are NaN."""
    source: jax.Array
    """Where it starts from; within the pool whatever was asked for."""
    target: jax.Array
    """[N_seq, 1], or a slot for every token in speculative decode, [N_seq, T_max]; S for one that keeps nothing."""
    known: jax.Array
    """Like `target`: whether the slot is one that could be in the pool (or is padding), not one past its end."""


def _plan(r: Recurrence) -> _Plan:
    dims, indices = r.dims, r.indices
    S, T, N_seq = dims.S, dims.T, dims.N_seq
    if indices.cu_seqlens is None:
        begin, length = jnp.arange(N_seq, dtype=jnp.int32), jnp.ones(N_seq, jnp.int32)
    else:
        bounds = jnp.clip(indices.cu_seqlens, 0, T)
        begin, length = bounds[:-1], jnp.maximum(bounds[1:] - bounds[:-1], 0)
    if indices.source is None:
        source = jnp.arange(N_seq, dtype=jnp.int32)
        target = source[:, None]
    elif indices.accepted is None:
        source = indices.source
        target = (source if indices.target is None else indices.target)[:, None]
    else:
        column = jnp.clip(indices.accepted - 1, 0, dims.T_max - 1)
        source = jnp.take_along_axis(indices.source, column[:, None], axis=1)[:, 0]
        target = indices.source if indices.target is None else indices.target
    padding, known = r.is_padding(source), target < S
    live = ~padding & (source < S)
    if indices.accepted is None:
        live = live & known[:, 0]
    keeps = live[:, None] & known & ~r.is_padding(target)
    return _Plan(begin, length, padding, live, jnp.where(live, source, 0), jnp.where(keeps, target, S), known)


def forward(r: Recurrence) -> Result:
    if r.dims.T == 0 or r.dims.N_seq == 0:
        return jnp.zeros_like(r.y), r.state
    return _one_token(r) if r.indices.cu_seqlens is None else _packed(r)


def _one_token(r: Recurrence) -> Result:
    """Every sequence has one token: no loop."""
    plan = _plan(r)
    every = r.dims.N_seq
    h = r.state[:every] if r.indices.source is None else r.state[plan.source]
    y, h = r.step(h.astype(jnp.float32), r.rows)
    y = _mark(y, plan.padding, plan.live & plan.known[:, 0]).astype(r.y.dtype)
    if r.indices.source is None:
        stored = r.stored(h, jnp.arange(every, dtype=jnp.int32))
        return y, lax.dynamic_update_slice_in_dim(r.state, stored, 0, axis=0)
    return y, _keep(r, r.state, h, plan.target[:, 0])


def _packed(r: Recurrence) -> Result:
    """All sequences advance together, one token a trip; as many trips as the longest has tokens."""
    dims, plan = r.dims, _plan(r)
    speculative = r.indices.accepted is not None

    def trip(carry):
        i, h, y, state = carry
        running = i < plan.length
        at = jnp.where(running, plan.begin + i, 0)
        out, new = r.step(h, {name: array[at] for name, array in r.rows.items()})
        good = plan.live
        if speculative:
            column = jnp.minimum(i, dims.T_max - 1)
            within = running & (i < dims.T_max)
            good = good & (~within | plan.known[:, column])
            state = _keep(r, state, new, jnp.where(within, plan.target[:, column], dims.S))
        out = _mark(out, plan.padding, good).astype(y.dtype)
        y = y.at[jnp.where(running, at, dims.T)].set(out, mode="drop")
        return i + 1, jnp.where(running[:, None, None, None], new, h), y, state

    h = r.state[plan.source].astype(jnp.float32)
    start = vary_alike((jnp.int32(0), h, jnp.zeros_like(r.y), r.state), (r.rows, r.weights, plan))
    longest = jnp.max(plan.length)
    _, h, y, state = lax.while_loop(lambda carry: carry[0] < longest, trip, start)
    if not speculative:
        state = _keep(r, state, h, jnp.where(plan.length > 0, plan.target[:, 0], dims.S))
    return y, state


def differentiable(r: Recurrence) -> Result:
    """What gradients are taken of: `forward` without a loop of unknown length, its states rounded to nearest.

    A scan over the packed tokens, in their order; it keeps the fp32 state after each.
    """
    dims = r.dims
    S, T = dims.S, dims.T
    if T == 0 or dims.N_seq == 0:
        return jnp.zeros_like(r.y), r.state
    plan = _plan(r)
    token = jnp.arange(T, dtype=jnp.int32)
    if r.indices.cu_seqlens is None:
        sequence, inside = token, jnp.ones(T, bool)
    else:
        sequence = jnp.searchsorted(plan.begin + plan.length, token, side="right").astype(jnp.int32)
        sequence = jnp.minimum(sequence, dims.N_seq - 1)
        inside = (token >= plan.begin[sequence]) & (token < plan.begin[sequence] + plan.length[sequence])
    place = token - plan.begin[sequence]
    if r.indices.accepted is None:
        last = inside & (place == plan.length[sequence] - 1)
        target = jnp.where(last, plan.target[sequence, 0], S)
        known = jnp.ones(T, bool)  # a target past the end has already made the sequence not live
    else:
        column = jnp.clip(place, 0, dims.T_max - 1)
        within = inside & (place < dims.T_max)
        target = jnp.where(within, plan.target[sequence, column], S)
        known = ~within | plan.known[sequence, column]
    padding = plan.padding[sequence] | ~inside

    # What a padding row holds must not reach a gradient, not even as 0 · NaN.
    used = inside & plan.live[sequence]
    rows = {name: jnp.where(_column(used, array), array, 0) for name, array in r.rows.items()}
    start = r.state[plan.source].astype(jnp.float32)
    start = jnp.where(_column(plan.live, start), start, 0.0)

    if r.indices.cu_seqlens is None:
        y, h = r.step(start, rows)
    else:

        def scan_step(h, xs):
            fresh, sequence_t, row = xs
            h = jnp.where(fresh, start[sequence_t], h[0])[None]
            out, h = r.step(h, {name: array[None] for name, array in row.items()})
            return h, (out[0], h[0])

        tokens = place == 0, sequence, rows
        _, (y, h) = lax.scan(scan_step, vary_alike(jnp.zeros_like(start[:1]), (start, r.weights, tokens)), tokens)
    y = _mark(y, padding, plan.live[sequence] & known).astype(r.y.dtype)
    return y, r.state.at[target].set(h.astype(r.state.dtype), mode="drop")


def _column(flags: jax.Array, like: jax.Array) -> jax.Array:
    """Flags of rows, to be broadcast over all that a row of `like` has."""
    return flags.reshape(-1, *(1,) * (like.ndim - 1))


def _mark(y: jax.Array, padding: jax.Array, good: jax.Array) -> jax.Array:
    """Zero for padding, NaN for what would lie past the end of the pool."""
    # NaN nowhere else, not even on the way: `jax.debug_nans` would see it.
    y = jnp.where(_column(padding, y), 0.0, y)
    return jnp.where(_column(good | padding, y), y, jnp.nan)


def _keep(r: Recurrence, state: jax.Array, h: jax.Array, slot: jax.Array) -> jax.Array:
    """`state` with h [n,…] in its slots; slot S is dropped."""
    stored = r.stored(h, slot)
    # Where two rows may go to one place, XLA writes 16-bit elements by compare-and-swap, several times slower. So what is
    # dropped gets places of its own, too.
    S = r.dims.S
    slot = jnp.where(slot < S, slot, S + jnp.arange(slot.shape[0], dtype=slot.dtype))
    return state.at[slot].set(stored, mode="drop", unique_indices=True)
