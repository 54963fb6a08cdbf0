"""Functions that the kernels and the XLA forms share, with the rounding that both packages promise.

They are written in the few primitives that Mosaic GPU lowers (no log1p, expm1 or `jax.nn`).
"""

import jax
import jax.numpy as jnp

LOG2E = 1.4426950408889634


def exp(value: jax.Array) -> jax.Array:
    return jnp.exp2(value * LOG2E)


def softplus(value: jax.Array) -> jax.Array:
    """max(v, 0) + log1p(exp(-|v|)), with log1p(e) = log(u)·e/(u - 1), u = 1 + e.

    log(1 + e) alone loses every bit of e below 2^-24, and a very negative dt is where small steps come from. The
    quotient puts the lost bits back (Kahan, HP-15C Advanced Functions Handbook).
    """
    e = exp(-jnp.abs(value))
    u = 1.0 + e
    # u - 1 is 0 or at least 2^-23. Where it is 0 the quotient is not used, but a division by 0 would reach the gradient.
    log1p = jnp.where(u == 1.0, e, jnp.log(u) * (e / jnp.maximum(u - 1.0, 2.0**-24)))
    return jnp.maximum(value, 0.0) + log1p


def silu(value: jax.Array) -> jax.Array:
    return value / (1.0 + exp(-value))
