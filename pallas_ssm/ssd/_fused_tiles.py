"""Shared memory of the fused path, and what its warpgroups do with tiles of it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ._tiles import COLUMNS, LAYOUT, ROWS, load

_SWIZZLE = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
_TILED = (plgpu.TilingTransform((8, COLUMNS)), _SWIZZLE)  # pyright: ignore[reportAbstractUsage]


def tiles(*shape: int, dtype: Any, linear: bool = False) -> Any:
    """(as TMA sees them, as wgmma and registers do[, without a swizzle]): [64, 64] tiles, one piece of shared memory.

    Mosaic GPU lets TMA write a tiled view only where it can prove that the first row is a multiple of 8, which the first token
    of a packed sequence is not. Rows of 128 swizzled bytes lie the same with the tiling and without.
    """
    shape, dtype = (*shape, ROWS, COLUMNS), jnp.dtype(dtype)
    views = [plgpu.SMEM(shape, dtype, transforms=(_SWIZZLE,)), plgpu.SMEM(shape, dtype, transforms=_TILED)]
    return plgpu.RefUnion(*views, *([plgpu.SMEM(shape, dtype)] if linear else []))


def operand(*shape: int, dtype: Any) -> Any:
    """[64, 64] tiles that no TMA touches."""
    return plgpu.SMEM((*shape, ROWS, COLUMNS), jnp.dtype(dtype), transforms=_TILED)


def clear(tile: Any, rows: jax.Array, count: jax.Array) -> None:
    """Rows at or past `count` become zero. `rows`: each element's row."""
    values = load(tile, layout=LAYOUT)
    tile[...] = jnp.where(rows < count, values, jnp.zeros_like(values))


def store_rows(tile: Any, target: Any, first: jax.Array, count: jax.Array) -> None:
    """The first `count` < 64 rows of a tile without a swizzle to rows of `target` from `first` on.

    A copy cannot be masked: one for each power of two.
    """
    at: Any = 0
    size = ROWS // 2
    while size:
        take = (count & size) != 0

        @pl.when(take)
        def _(at: Any = at, size: int = size) -> None:
            plgpu.copy_smem_to_gmem(tile.at[pl.ds(at, size)], target.at[pl.ds(first + at, size)])

        at = at + jnp.where(take, size, 0)
        size //= 2


def rem(a: Any, b: int) -> jax.Array:
    return lax.rem(a, jnp.int32(b))
