"""How a loop over the chunks of packed sequences reads and writes a pool [N_seq,…] of their states.

The derivatives are written out because JAX's own would pass over the whole pool at every chunk: each sequence reads its state
once, at its first slot, and what it leaves is what it wrote last. So a cotangent of the pool is read at a sequence's last slot
and written at its first, in one place, and the pool's is updated in place as the pool is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def take_from_pool(
    pool: jax.Array, state: jax.Array, sequence: jax.Array, first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(pool, the state [1,…] before a slot): the sequence's own at its first, else that which the last slot left.

    By a select: what an earlier sequence left may be NaN.
    """
    return pool, jnp.where(first, lax.dynamic_index_in_dim(pool, sequence, 0), state)


def _take(pool: jax.Array, state: jax.Array, sequence: jax.Array, first: jax.Array):
    return take_from_pool(pool, state, sequence, first), (sequence, first)


def _take_backward(residuals: Any, cotangents: Any):
    sequence, first = residuals
    pool, state = cotangents
    own = jnp.where(first, state, lax.dynamic_index_in_dim(pool, sequence, 0))
    return lax.dynamic_update_slice_in_dim(pool, own, sequence, 0), jnp.where(first, 0.0, state), None, None


take_from_pool.defvjp(_take, _take_backward)


@jax.custom_vjp
def put_in_pool(pool: jax.Array, state: jax.Array, sequence: jax.Array, last: jax.Array) -> jax.Array:
    """The pool with the state [1,…] after a slot in its sequence's place. `last`: whether it is the sequence's last slot."""
    del last
    return lax.dynamic_update_slice_in_dim(pool, state, sequence, 0)


def _put(pool: jax.Array, state: jax.Array, sequence: jax.Array, last: jax.Array):
    return put_in_pool(pool, state, sequence, last), (sequence, last)


def _put_backward(residuals: Any, pool: jax.Array):
    sequence, last = residuals
    return pool, jnp.where(last, lax.dynamic_index_in_dim(pool, sequence, 0), 0.0), None, None


put_in_pool.defvjp(_put, _put_backward)
