"""Between the passes over segments: the states that they begin with, by XLA."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._fused_shape import CHUNK, Shape


def states(shape: Shape, ends: jax.Array, initial: jax.Array | None, cu_seqlens: jax.Array | None) -> jax.Array:
    """[segments, H_v, V, K], transposed as `initial` [N_seq,H_v,V,K] is. A segment makes S^T·ends[V:] + ends[:V] of S^T."""
    dims = shape.static.dims
    if initial is None:
        initial = jnp.zeros((dims.N_seq, dims.H_v, dims.V, dims.K), jnp.float32)
    initial = initial.astype(jnp.float32)
    if cu_seqlens is None:
        # All rows at once.
        rows = ends.reshape(dims.B, -1, *ends.shape[1:])
        found = [initial]
        for n in range(shape.row_segments - 1):
            found.append(_after(rows[:, n], found[-1], dims.V))
        return jnp.stack(found, axis=1).reshape(-1, *initial.shape[1:])
    first, numbers = _firsts(shape, cu_seqlens), jnp.arange(shape.segments)
    sequence = jnp.searchsorted(first, numbers, side="right", method="compare_all") - 1
    begins, own = first[sequence] == numbers, initial[sequence]
    found = [own[0]]
    for n in range(1, shape.segments):
        found.append(jnp.where(begins[n], own[n], _after(ends[n - 1], found[-1], dims.V)))
    return jnp.stack(found)


def _after(ends: jax.Array, state: jax.Array, V: int) -> jax.Array:
    product = jnp.einsum("...vk,...kj->...vj", state, ends[..., V:, :], precision=lax.Precision.HIGHEST)
    return product + ends[..., :V, :]


def lasts(shape: Shape, cu_seqlens: jax.Array | None) -> jax.Array | np.ndarray:
    """[N_seq]: each sequence's last segment. One without tokens has one."""
    if cu_seqlens is None:
        return np.arange(1, shape.static.dims.B + 1) * shape.row_segments - 1
    lengths = jnp.diff(_bounds(shape, cu_seqlens))
    segments = -(-lengths // (CHUNK * shape.segment))
    return jnp.clip(_firsts(shape, cu_seqlens) + jnp.maximum(segments, 1) - 1, 0, shape.segments - 1)


def _bounds(shape: Shape, cu_seqlens: jax.Array) -> jax.Array:
    return jnp.clip(cu_seqlens.astype(jnp.int32), 0, shape.static.dims.T).at[0].set(0)


def _firsts(shape: Shape, cu_seqlens: jax.Array) -> jax.Array:
    """Each sequence's first segment, as `Shape.locate` has it."""
    numbers = jnp.arange(shape.static.dims.N_seq, dtype=jnp.int32)
    return shape.first_segment(_bounds(shape, cu_seqlens)[:-1], numbers)
