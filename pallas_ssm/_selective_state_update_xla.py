"""`selective_state_update` in plain JAX: for any device and shape, and what gradients are taken of."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from . import _slots_xla
from ._activations_xla import silu
from ._numerics import exp, softplus
from ._selective_state_update_call import Floats, Integers, Static
from ._slots_xla import Recurrence, Result, Rows
from ._stochastic_rounding import counter, random_bits, stochastic_round

_PER_TOKEN = ("x", "dt", "B", "C", "z")


def forward(static: Static, floats: Floats, integers: Integers) -> Result:
    return _slots_xla.forward(_recurrence(static, floats, integers))


def differentiable(static: Static, floats: Floats, integers: Integers) -> Result:
    """What gradients are taken of: without stochastic rounding."""
    return _slots_xla.differentiable(_recurrence(static, floats, integers))


def _recurrence(static: Static, floats: Floats, integers: Integers) -> Recurrence:
    rows = {name: array for name in _PER_TOKEN if (array := getattr(floats, name)) is not None}
    stored = partial(_stored, static, floats.state.dtype, integers.key)
    step = partial(_step, static, floats)
    return Recurrence(static.dims, integers, static.is_padding, rows, floats, floats.state, floats.x, step, stored)


def _step(static: Static, weights: Floats, h: jax.Array, rows: Rows) -> Result:
    """h [n,H,P,N]."""
    dims = static.dims
    n = h.shape[0]

    def fp32(array: jax.Array, *shape: int) -> jax.Array:
        return array.astype(jnp.float32).reshape(shape)

    x = fp32(rows["x"], n, dims.H, dims.P)
    step = fp32(rows["dt"], n, dims.H, 1 if dims.tied_dt else dims.P)
    if weights.dt_bias is not None:
        step = step + fp32(weights.dt_bias, 1, dims.H, 1 if dims.tied_dt_bias else dims.P)
    if static.dt_softplus:
        step = softplus(step)
    A = fp32(weights.A, 1, dims.H, *((1, 1) if dims.tied_A else (dims.P, dims.N)))
    B, C = (jnp.repeat(fp32(rows[name], n, dims.G, 1, dims.N), dims.H // dims.G, axis=1) for name in "BC")
    h = h * exp(A * step[..., None]) + (step * x)[..., None] * B
    y = jnp.sum(h * C, axis=-1)
    if weights.D is not None:
        y = y + fp32(weights.D, 1, dims.H, 1 if dims.tied_D else dims.P) * x
    if "z" in rows:
        y = y * silu(fp32(rows["z"], n, dims.H, dims.P))
    return y, h


def _stored(static: Static, dtype: jnp.dtype, key: jax.Array | None, h: jax.Array, slot: jax.Array) -> jax.Array:
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
