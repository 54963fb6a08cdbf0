"""What the fused path's warpgroups do with tiles of shared memory, beside what all kernels of the scan do."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._branches import when
from .._copies import copy_rows
from ._tiles import COLUMNS, LAYOUT, ROWS, TILED, load


def operand(*shape: int, dtype: Any) -> Any:
    """[64, 64] tiles that no TMA touches."""
    return plgpu.SMEM((*shape, ROWS, COLUMNS), jnp.dtype(dtype), transforms=TILED)


def clear(tile: Any, rows: jax.Array, count: jax.Array) -> None:
    """Rows at or past `count` become zero. `rows`: each element's row."""
    values = load(tile, layout=LAYOUT)
    tile[...] = jnp.where(rows < count, values, jnp.zeros_like(values))


def store_rows_clipped(tile: Any, y: Any, part: jax.Array, first: jax.Array, count: jax.Array) -> None:
    """The first `count` < 64 rows of a tile without a swizzle to part `part` of y [T, P], from row `first` on.

    TMA drops what lies behind the last channel. But a lone row Mosaic GPU copies as so many bytes, which would go on into the
    next head: it leaves in a copy of the channels that every part has, and one of those that whole parts have beside them.
    """
    whole, rest = divmod(y.shape[1], COLUMNS)

    def copy(row: Any, rows: int, column: int, columns: int) -> None:
        target = y.at[pl.ds(first + row, rows), pl.ds(part * COLUMNS + column, columns)]
        plgpu.copy_smem_to_gmem(tile.at[pl.ds(row, rows), pl.ds(column, columns)], target)

    def clipped(row: Any, rows: int) -> None:
        if rows > 1:
            copy(row, rows, 0, COLUMNS)
            return
        copy(row, 1, 0, rest)
        when(part < whole)(lambda: copy(row, 1, rest, COLUMNS - rest))

    copy_rows(clipped, count)


def rem(a: Any, b: int) -> jax.Array:
    return lax.rem(a, jnp.int32(b))
