"""Sigmoid and SiLU of the XLA forms: the values of `_numerics`, and derivatives that are finite wherever they are.

Differentiated as they are written, 1 + exp(-v) overflows below v = -88 and leaves 0 · inf.
"""

from typing import Any

import jax

from . import _numerics

Pair = tuple[jax.Array, jax.Array]


@jax.custom_jvp
def sigmoid(value: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + _numerics.exp(-value))


@sigmoid.defjvp
def _sigmoid_jvp(primals: Any, tangents: Any) -> Pair:
    (value,) = primals
    s = sigmoid(value)
    # Not 1 - s, which has lost what little is left of it where s is nearly 1.
    return s, tangents[0] * (s * sigmoid(-value))


@jax.custom_jvp
def silu(value: jax.Array) -> jax.Array:
    return _numerics.silu(value)


@silu.defjvp
def _silu_jvp(primals: Any, tangents: Any) -> Pair:
    (value,) = primals
    return silu(value), tangents[0] * (sigmoid(value) * (1.0 + value * sigmoid(-value)))
