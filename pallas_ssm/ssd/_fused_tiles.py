"""What the fused path's warpgroups do with tiles of shared memory, beside what all kernels of the scan do."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ._tiles import COLUMNS, LAYOUT, ROWS, TILED, load


def operand(*shape: int, dtype: Any) -> Any:
    """[64, 64] tiles that no TMA touches."""
    return plgpu.SMEM((*shape, ROWS, COLUMNS), jnp.dtype(dtype), transforms=TILED)


def clear(tile: Any, rows: jax.Array, count: jax.Array) -> None:
    """Rows at or past `count` become zero. `rows`: each element's row."""
    values = load(tile, layout=LAYOUT)
    tile[...] = jnp.where(rows < count, values, jnp.zeros_like(values))


def rem(a: Any, b: int) -> jax.Array:
    return lax.rem(a, jnp.int32(b))
