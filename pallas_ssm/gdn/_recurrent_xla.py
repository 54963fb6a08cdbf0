"""`fused_recurrent_gated_delta_rule` in plain JAX: the form for any device and shape, and the one that gradients are taken of.

Slots, bounds and padding are `selective_state_update`'s.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from .. import _selective_state_update_xla as ssu
from .._numerics import exp, softplus
from ._recurrent_call import Floats, Integers, Static
from ._xla_stages import l2norm

Result = tuple[jax.Array, jax.Array]

_PER_TOKEN = ("q", "k", "v", "g", "beta")


def make_plan(static: Static, integers: Integers) -> ssu.Plan:
    # It reads sizes, slots and bounds, which both operators have under the same names.
    return ssu.make_plan(cast(Any, static), cast(Any, integers))


def forward(static: Static, floats: Floats, integers: Integers) -> Result:
    if static.dims.T == 0 or static.dims.N_seq == 0:
        return jnp.zeros_like(floats.v), floats.state
    step = _one_token if integers.cu_seqlens is None else _packed
    return step(static, floats, integers)


def _one_token(static: Static, floats: Floats, integers: Integers) -> Result:
    """Every sequence has one token: no loop."""
    plan = make_plan(static, integers)
    every = static.dims.N_seq
    S = floats.state[:every] if integers.source is None else floats.state[plan.source]
    o, S = _step(static, floats, S.astype(jnp.float32), floats)
    o = _mark(o, plan.padding, plan.live & plan.known[:, 0]).astype(floats.v.dtype)
    if integers.source is None:
        return o, lax.dynamic_update_slice_in_dim(floats.state, S.astype(floats.state.dtype), 0, axis=0)
    return o, _keep(static, floats.state, S, plan.target[:, 0])


def _packed(static: Static, floats: Floats, integers: Integers) -> Result:
    """All sequences advance together, one token a trip; as many trips as the longest has tokens."""
    dims = static.dims
    plan = make_plan(static, integers)
    speculative = integers.accepted is not None

    def trip(carry):
        i, S, o, state = carry
        running = i < plan.length
        at = jnp.where(running, plan.begin + i, 0)
        out, new = _step(static, floats, S, _rows(floats, at))
        good = plan.live
        if speculative:
            column = jnp.minimum(i, dims.T_max - 1)
            within = running & (i < dims.T_max)
            good = good & (~within | plan.known[:, column])
            state = _keep(static, state, new, jnp.where(within, plan.target[:, column], dims.S))
        out = _mark(out, plan.padding, good).astype(o.dtype)
        o = o.at[jnp.where(running, at, dims.T)].set(out, mode="drop")
        return i + 1, jnp.where(running[:, None, None, None], new, S), o, state

    S = floats.state[plan.source].astype(jnp.float32)
    start = (jnp.int32(0), S, jnp.zeros_like(floats.v), floats.state)
    longest = jnp.max(plan.length)
    _, S, o, state = lax.while_loop(lambda carry: carry[0] < longest, trip, start)
    if not speculative:
        state = _keep(static, state, S, jnp.where(plan.length > 0, plan.target[:, 0], dims.S))
    return o, state


def differentiable(static: Static, floats: Floats, integers: Integers) -> Result:
    """What gradients are taken of: `forward` without a loop of unknown length.

    A scan over the packed tokens, in their order; it keeps the state after each, [T,H_v,K,V] in fp32.
    """
    dims = static.dims
    S, T = dims.S, dims.T
    if T == 0 or dims.N_seq == 0:
        return jnp.zeros_like(floats.v), floats.state
    plan = make_plan(static, integers)
    token = jnp.arange(T, dtype=jnp.int32)
    if integers.cu_seqlens is None:
        sequence, inside = token, jnp.ones(T, bool)
    else:
        sequence = jnp.searchsorted(plan.begin + plan.length, token, side="right").astype(jnp.int32)
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
        o, after = _step(static, floats, start, rows)
    else:

        def scan_step(S, xs):
            fresh, sequence_t, row = xs
            S = jnp.where(fresh, start[sequence_t], S[0])[None]
            out, S = _step(static, floats, S, floats._replace(**{name: array[None] for name, array in row.items()}))
            return S, (out[0], S[0])

        per_token = {name: getattr(rows, name) for name in _PER_TOKEN}
        _, (o, after) = lax.scan(scan_step, jnp.zeros_like(start[:1]), (place == 0, sequence, per_token))
    o = _mark(o, padding, plan.live[sequence] & known).astype(floats.v.dtype)
    return o, floats.state.at[target].set(after.astype(floats.state.dtype), mode="drop")


def _rows(floats: Floats, at: jax.Array) -> Floats:
    """The rows of the tokens `at`."""
    return floats._replace(**{name: getattr(floats, name)[at] for name in _PER_TOKEN})


def _step(static: Static, weights: Floats, S: jax.Array, rows: Floats) -> Result:
    """(o, state) in fp32 of one token for each of n sequences: S [n,H_v,K,V], and the tokens' rows of q, k, v, g, beta."""
    q, k = (l2norm(row) if static.use_qk_l2norm else row for row in (rows.q, rows.k))
    heads = static.dims.H_v // static.dims.H_k
    q, k = (jnp.repeat(row.astype(jnp.float32), heads, axis=1)[..., None] for row in (q, k))
    g, beta = rows.g.astype(jnp.float32), rows.beta.astype(jnp.float32)
    if weights.A_log is not None:
        if weights.dt_bias is not None:
            g = g + weights.dt_bias.astype(jnp.float32)
        g = -exp(weights.A_log.astype(jnp.float32)) * softplus(g)
    if static.sigmoid_beta:
        beta = 1.0 / (1.0 + exp(-beta))
    S = S * exp(g)[..., None, None]
    fresh = beta[..., None] * (rows.v.astype(jnp.float32) - jnp.sum(S * k, axis=2))
    S = S + k * fresh[:, :, None]
    return jnp.sum(S * q, axis=2) * static.scale, S


def _mark(o: jax.Array, padding: jax.Array, good: jax.Array) -> jax.Array:
    """Zero for padding, NaN for what would lie past the end of the pool."""
    o = jnp.where(good[:, None, None], o, jnp.nan)
    return jnp.where(padding[:, None, None], 0.0, o)


def _keep(static: Static, state: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """`state` with `new` [n,H_v,K,V] in its slots; slot S is dropped."""
    # Where two rows may go to one place, XLA writes 16-bit elements by compare-and-swap, several times slower. So what is
    # dropped gets places of its own, too.
    S = static.dims.S
    slot = jnp.where(slot < S, slot, S + jnp.arange(slot.shape[0], dtype=slot.dtype))
    return state.at[slot].set(new.astype(state.dtype), mode="drop", unique_indices=True)
