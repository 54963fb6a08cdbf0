"""(I + A)^-1 of many strictly lower triangles at once, in plain JAX: forward substitution by blocks, from 2 x 2 to the whole.

    (I + [A11  0 ])^-1 = [  X1            0 ]        X1 = (I + A11)^-1, X2 = (I + A22)^-1
         [A21 A22]       [-X2·A21·X1     X2 ]

Not products of powers of A: keys that resemble each other make these grow like binomials before they vanish, and of a 64 x 64
inverse all is lost to cancellation. The inverse stays small, and so does every number here.
"""

import jax
import jax.numpy as jnp
from jax import lax

# What tensor-shaped products are at least of.
_BLOCK = 16


@jax.custom_jvp
def invert(A: jax.Array) -> jax.Array:
    """[...,L,L] fp32, L a multiple of 16 by a power of two. What A holds on its diagonal and above is not looked at."""
    *batch, L, _ = A.shape
    A = A.reshape(-1, L, L)
    X = _invert_blocks(_diagonal(A, _BLOCK))
    size = _BLOCK
    while size < L:
        first, second = X[:, 0::2], X[:, 1::2]
        corner = -_product(second, _product(_diagonal(A, 2 * size)[..., size:, :size], first))
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        X = jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        size *= 2
    return X.reshape(*batch, L, L)


@invert.defjvp
def _jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # From the inverse alone: nothing of the substitution is kept for a backward pass.
    X = invert(*primals)
    return X, -_product(X, _product(jnp.tril(tangents[0], -1), X))


def _diagonal(A: jax.Array, size: int) -> jax.Array:
    """[n,L/size,size,size]: the blocks on the diagonal."""
    return jnp.stack([A[:, at : at + size, at : at + size] for at in range(0, A.shape[-1], size)], axis=1)


def _invert_blocks(D: jax.Array) -> jax.Array:
    """The inverses of I + [n,m,S,S]. Products of less than S x S are no cheaper than whole ones, whose factors are zero."""
    i, j = jnp.indices(D.shape[-2:])
    X = jnp.eye(D.shape[-1], dtype=D.dtype) - jnp.where((i // 2 == j // 2) & (i > j), D, 0.0)
    size = 2
    while size < D.shape[-1]:
        # All A21 of this size at once: X·A21·X is then every X2·A21·X1 in its place.
        A21 = jnp.where((i // (2 * size) == j // (2 * size)) & (i // size > j // size), D, 0.0)
        X = X - _product(_product(X, A21), X)
        size *= 2
    return X


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
