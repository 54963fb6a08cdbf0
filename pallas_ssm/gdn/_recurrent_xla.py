"""`fused_recurrent_gated_delta_rule` in plain JAX: for any device and shape, and what gradients are taken of."""

from functools import partial

import jax
import jax.numpy as jnp

from .. import _slots_xla
from .._activations_xla import sigmoid
from .._numerics import exp, softplus
from .._slots_xla import Recurrence, Result, Rows
from ._recurrent_call import Floats, Integers, Static
from ._xla_stages import l2norm


def forward(static: Static, floats: Floats, integers: Integers) -> Result:
    return _slots_xla.forward(_recurrence(static, floats, integers))


def differentiable(static: Static, floats: Floats, integers: Integers) -> Result:
    return _slots_xla.differentiable(_recurrence(static, floats, integers))


def _recurrence(static: Static, floats: Floats, integers: Integers) -> Recurrence:
    rows = {name: getattr(floats, name) for name in ("q", "k", "v", "g", "beta")}
    state = floats.state
    step = partial(_step, static, floats)

    def stored(S: jax.Array, _: jax.Array) -> jax.Array:
        return S.astype(state.dtype)

    return Recurrence(static.dims, integers, static.is_padding, rows, floats, state, floats.v, step, stored)


def _step(static: Static, weights: Floats, S: jax.Array, rows: Rows) -> Result:
    """S [n,H_v,K,V]."""
    q, k = (l2norm(rows[name]) if static.use_qk_l2norm else rows[name] for name in "qk")
    heads = static.dims.H_v // static.dims.H_k
    q, k = (jnp.repeat(row.astype(jnp.float32), heads, axis=1)[..., None] for row in (q, k))
    g, beta = rows["g"].astype(jnp.float32), rows["beta"].astype(jnp.float32)
    if weights.A_log is not None:
        if weights.dt_bias is not None:
            g = g + weights.dt_bias.astype(jnp.float32)
        g = -exp(weights.A_log.astype(jnp.float32)) * softplus(g)
    if static.sigmoid_beta:
        beta = sigmoid(beta)
    S = S * exp(g)[..., None, None]
    fresh = beta[..., None] * (rows["v"].astype(jnp.float32) - jnp.sum(S * k, axis=2))
    S = S + k * fresh[:, :, None]
    return jnp.sum(S * q, axis=2) * static.scale, S
