"""`selective_state_update` in plain JAX: the form for any device and shape, and the one that gradients are taken of."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._numerics import exp, silu, softplus
from ._selective_state_update_call import Floats, Integers, Static
from ._stochastic_rounding import counter, random_bits, stochastic_round

Result = tuple[jax.Array, jax.Array]


class Plan(NamedTuple):
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


def make_plan(static: Static, integers: Integers) -> Plan:
    dims = static.dims
    S, T, N_seq = dims.S, dims.T, dims.N_seq
    if integers.cu_seqlens is None:
        begin, length = jnp.arange(N_seq, dtype=jnp.int32), jnp.ones(N_seq, jnp.int32)
    else:
        bounds = jnp.clip(integers.cu_seqlens, 0, T)
        begin, length = bounds[:-1], jnp.maximum(bounds[1:] - bounds[:-1], 0)
    if integers.source is None:
        source = jnp.arange(N_seq, dtype=jnp.int32)
        target = source[:, None]
    elif integers.accepted is None:
        source = integers.source
        target = (source if integers.target is None else integers.target)[:, None]
    else:
        column = jnp.clip(integers.accepted - 1, 0, dims.T_max - 1)
        source = jnp.take_along_axis(integers.source, column[:, None], axis=1)[:, 0]
        target = integers.source if integers.target is None else integers.target
    padding, known = static.is_padding(source), target < S
    live = ~padding & (source < S)
    if integers.accepted is None:
        live = live & known[:, 0]
    keeps = live[:, None] & known & ~static.is_padding(target)
    return Plan(begin, length, padding, live, jnp.where(live, source, 0), jnp.where(keeps, target, S), known)


def forward(static: Static, floats: Floats, integers: Integers) -> Result:
    if static.dims.T == 0 or static.dims.N_seq == 0:
        return jnp.zeros_like(floats.x), floats.state
    step = _one_token if integers.cu_seqlens is None else _packed
    return step(static, floats, integers)


def _one_token(static: Static, floats: Floats, integers: Integers) -> Result:
    """Every sequence has one token: no loop."""
    plan = make_plan(static, integers)
    every = static.dims.N_seq
    h = floats.state[:every] if integers.source is None else floats.state[plan.source]
    y, h = _step(static, floats, h.astype(jnp.float32), floats)
    y = _mark(y, plan.padding, plan.live & plan.known[:, 0]).astype(floats.x.dtype)
    if integers.source is None:
        stored = _stored(static, h, jnp.arange(every, dtype=jnp.int32), floats.state.dtype, integers.key)
        return y, lax.dynamic_update_slice_in_dim(floats.state, stored, 0, axis=0)
    return y, _keep(static, floats.state, h, plan.target[:, 0], integers.key)


def _packed(static: Static, floats: Floats, integers: Integers) -> Result:
    """All sequences advance together, one token a trip; as many trips as the longest has tokens."""
    dims = static.dims
    plan = make_plan(static, integers)
    speculative = integers.accepted is not None

    def trip(carry):
        i, h, y, state = carry
        running = i < plan.length
        at = jnp.where(running, plan.begin + i, 0)
        out, new = _step(static, floats, h, _rows(floats, at))
        good = plan.live
        if speculative:
            column = jnp.minimum(i, dims.T_max - 1)
            within = running & (i < dims.T_max)
            good = good & (~within | plan.known[:, column])
            state = _keep(static, state, new, jnp.where(within, plan.target[:, column], dims.S), integers.key)
        out = _mark(out, plan.padding, good).astype(y.dtype)
        y = y.at[jnp.where(running, at, dims.T)].set(out, mode="drop")
        return i + 1, jnp.where(running[:, None, None, None], new, h), y, state

    h = floats.state[plan.source].astype(jnp.float32)
    start = (jnp.int32(0), h, jnp.zeros_like(floats.x), floats.state)
    longest = jnp.max(plan.length)
    _, h, y, state = lax.while_loop(lambda carry: carry[0] < longest, trip, start)
    if not speculative:
        state = _keep(static, state, h, jnp.where(plan.length > 0, plan.target[:, 0], dims.S), integers.key)
    return y, state


def differentiable(static: Static, floats: Floats, integers: Integers) -> Result:
    """What gradients are taken of: `forward` without a loop of unknown length, and without stochastic rounding.

    A scan over the packed tokens, in their order; it keeps the state after each, [T,H,P,N] in fp32.
    """
    dims = static.dims
    S, T = dims.S, dims.T
    if T == 0 or dims.N_seq == 0:
        return jnp.zeros_like(floats.x), floats.state
    plan = make_plan(static, integers)
    token = jnp.arange(T, dtype=jnp.int32)
    if integers.cu_seqlens is None:
        sequence, inside = token, jnp.ones(T, bool)
    else:
        sequence = jnp.searchsorted(integers.cu_seqlens[1:], token, side="right").astype(jnp.int32)
        sequence = jnp.minimum(sequence, dims.N_seq - 1)
        inside = (token >= plan.begin[sequence]) & (token < plan.begin[sequence] + plan.length[sequence])
    place = token - plan.begin[sequence]
    if integers.accepted is None:
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
    rows = floats._replace(
        **{
            name: jnp.where(used.reshape(-1, *(1,) * (array.ndim - 1)), array, 0)
            for name in _PER_TOKEN
            if (array := getattr(floats, name)) is not None
        }
    )
    start = jnp.where(plan.live[:, None, None, None], floats.state[plan.source].astype(jnp.float32), 0.0)

    if integers.cu_seqlens is None:
        y, h = _step(static, floats, start, rows)
    else:

        def scan_step(h, xs):
            fresh, sequence_t, row = xs
            h = jnp.where(fresh, start[sequence_t], h[0])[None]
            out, h = _step(static, floats, h, floats._replace(**{k: v[None] for k, v in row.items()}))
            return h, (out[0], h[0])

        per_token = {name: array for name in _PER_TOKEN if (array := getattr(rows, name)) is not None}
        _, (y, h) = lax.scan(scan_step, jnp.zeros_like(start[:1]), (place == 0, sequence, per_token))
    y = _mark(y, padding, plan.live[sequence] & known).astype(floats.x.dtype)
    return y, floats.state.at[target].set(h.astype(floats.state.dtype), mode="drop")


_PER_TOKEN = ("x", "dt", "B", "C", "z")


def _rows(floats: Floats, at: jax.Array) -> Floats:
    """The rows of the tokens `at`."""
    rows = {name: array[at] for name in _PER_TOKEN if (array := getattr(floats, name)) is not None}
    return floats._replace(**rows)


def _step(static: Static, weights: Floats, h: jax.Array, rows: Floats) -> Result:
    """(y, state) in fp32 of one token for each of n sequences: h [n,H,P,N], and the tokens' rows of x, dt, B, C, z."""
    dims = static.dims
    n = h.shape[0]

    def fp32(array: jax.Array, *shape: int) -> jax.Array:
        return array.astype(jnp.float32).reshape(shape)

    x = fp32(rows.x, n, dims.H, dims.P)
    step = fp32(rows.dt, n, dims.H, 1 if dims.tied_dt else dims.P)
    if weights.dt_bias is not None:
        step = step + fp32(weights.dt_bias, 1, dims.H, 1 if dims.tied_dt_bias else dims.P)
    if static.dt_softplus:
        step = softplus(step)
    A = fp32(weights.A, 1, dims.H, *((1, 1) if dims.tied_A else (dims.P, dims.N)))
    B, C = (jnp.repeat(fp32(array, n, dims.G, 1, dims.N), dims.H // dims.G, axis=1) for array in (rows.B, rows.C))
    h = h * exp(A * step[..., None]) + (step * x)[..., None] * B
    y = jnp.sum(h * C, axis=-1)
    if weights.D is not None:
        y = y + fp32(weights.D, 1, dims.H, 1 if dims.tied_D else dims.P) * x
    if rows.z is not None:
        y = y * silu(fp32(rows.z, n, dims.H, dims.P))
    return y, h


def _mark(y: jax.Array, padding: jax.Array, good: jax.Array) -> jax.Array:
    """Zero for padding, NaN for what would lie past the end of the pool."""
    y = jnp.where(good[:, None, None], y, jnp.nan)
    return jnp.where(padding[:, None, None], 0.0, y)


def _keep(static: Static, state: jax.Array, h: jax.Array, slot: jax.Array, key: jax.Array | None) -> jax.Array:
    """`state` with h [n,H,P,N] in its slots; slot S is dropped."""
    stored = _stored(static, h, slot, state.dtype, key)
    # Where two rows may go to one place, XLA writes 16-bit elements by compare-and-swap, several times slower. So what is
    # dropped gets places of its own, too.
    S = static.dims.S
    slot = jnp.where(slot < S, slot, S + jnp.arange(slot.shape[0], dtype=slot.dtype))
    return state.at[slot].set(stored, mode="drop", unique_indices=True)


def _stored(static: Static, h: jax.Array, slot: jax.Array, dtype: jnp.dtype, key: jax.Array | None) -> jax.Array:
    if key is None:
        return h.astype(dtype)
    dims = static.dims
    head = lax.broadcasted_iota(jnp.uint32, (1, dims.H, 1, 1), 1)
    base = slot.astype(jnp.uint32)[:, None, None, None] * jnp.uint32(dims.H) + head
    width = max(1, (1 << (dims.N - 1).bit_length()) // 8)
    local = lax.broadcasted_iota(jnp.uint32, (1, 1, dims.P, width), 2) * jnp.uint32(width)
    local = local + lax.broadcasted_iota(jnp.uint32, (1, 1, dims.P, width), 3)
    high, low = counter(base, dims.P, dims.N, local)
    return stochastic_round(h, random_bits((key[0], key[1]), high, low, dims.N), dtype)
