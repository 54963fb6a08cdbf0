"""Functions that the kernels and the XLA forms share, with the rounding that both packages promise.

They are written in the few primitives that Mosaic GPU lowers (no log1p, expm1 or `jax.nn`).
"""

import jax
import jax.numpy as jnp

LOG2E = 1.4426950408889634


def exp(value: jax.Array) -> jax.Array:
    return jnp.exp2(value * LOG2E)


def softplus(value: jax.Array) -> jax.Array:
    """max(v, 0) + log1p(exp(-|v|)), with log1p(e) = 2·artanh(s), s = e/(2 + e), by its series.

    log(1 + e) loses the low bits of e, and a hardware logarithm near 1 most of them, while a very negative dt is where small
    steps come from. s is at most 1/3, so seven terms leave nothing that fp32 could hold.
    """
    e = exp(-jnp.abs(value))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return jnp.maximum(value, 0.0) + 2.0 * s * series


def silu(value: jax.Array) -> jax.Array:
    return value / (1.0 + exp(-value))
