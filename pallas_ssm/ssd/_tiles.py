"""What the Mosaic GPU kernels of the stages share: tiles in shared memory, and where a chunk's tokens are."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ssm_configs.contracts.ssd import Dims

from .._branches import when
from .._copies import copy_rows

# Rows of a tile: what one warpgroup multiplies at a time.
ROWS = 64
# Columns of 16 bits that a row of 128 bytes holds.
COLUMNS = 64

LAYOUT = plgpu.Layout.WGMMA
DOWN, ACROSS = LAYOUT.reduce(1), LAYOUT.reduce(0)
"""A number for every row of a tile, and for every column."""

# What wgmma adds to. Exported, though not by the letter that type checkers go by.
ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]

# Conversions between layouts are wanted nowhere: an element is read by the thread that works on it.
load = partial(plgpu.load, optimized=False)


_SWIZZLE = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
TILED = (plgpu.TilingTransform((8, COLUMNS)), _SWIZZLE)  # pyright: ignore[reportAbstractUsage]


def tiles(*shape: int, dtype: Any, linear: bool = False) -> Any:
    """(as TMA sees them, as wgmma and registers do[, without a swizzle]): [64, 64] tiles, one piece of shared memory.

    Mosaic GPU lets TMA write a tiled view only where it can prove that the first row is a multiple of 8, which the first token
    of a packed sequence is not. Rows of 128 swizzled bytes lie the same with the tiling and without.
    """
    shape, dtype = (*shape, ROWS, COLUMNS), jnp.dtype(dtype)
    views = [plgpu.SMEM(shape, dtype, transforms=(_SWIZZLE,)), plgpu.SMEM(shape, dtype, transforms=TILED)]
    return plgpu.RefUnion(*views, *([plgpu.SMEM(shape, dtype)] if linear else []))


def tile(columns: int, dtype: Any) -> Any:
    """64 rows by `columns`, in pieces of 64 columns."""
    return tiles(columns // COLUMNS, dtype=dtype)


def fetch(rows: Any, into: Any, barrier: Any) -> None:
    """[64, columns] of global memory, however the rows lie; the barrier sees an arrival for each 64 columns."""
    for k in range(into[0].shape[0]):
        plgpu.copy_gmem_to_smem(rows.at[:, pl.ds(k * COLUMNS, COLUMNS)], into[0].at[k], barrier)


def down(vector: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), [0])


def across(vector: jax.Array, rows: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, (rows, vector.shape[0]), [1])


def indices(axis: int, columns: int = COLUMNS) -> jax.Array:
    """Each element's row (axis 0) or column (axis 1)."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), axis, layout=LAYOUT)


@dataclass(frozen=True)
class Where:
    """The tokens of one chunk."""

    begin: jax.Array
    """The first, in its batch row."""
    length: jax.Array
    """How many; none (or fewer than none) where no chunk stands in the slot."""
    sequence: jax.Array
    first: jax.Array
    """Whether its sequence begins with it."""


def locate(dims: Dims, cu_seqlens: Any, b: jax.Array, slot: jax.Array) -> Where:
    """The chunk in `slot` of batch row b."""
    if not dims.packed:
        begin = slot * dims.L
        return Where(begin, jnp.minimum(dims.T - begin, dims.L), b, slot == 0)

    def bound(n: jax.Array) -> jax.Array:
        # Bounds are data: whatever they hold, no token outside [0, T) is touched.
        return jnp.where(n == 0, 0, jnp.clip(cu_seqlens[n], 0, dims.T))

    def first_slot(n: jax.Array) -> jax.Array:
        return lax.div(bound(n), jnp.int32(dims.L)) + n

    n = last_sequence(first_slot, slot, dims.N_seq)
    chunk = slot - first_slot(n)
    begin = bound(n) + chunk * dims.L
    return Where(begin, jnp.minimum(bound(n + 1) - begin, dims.L), n, chunk == 0)


def last_sequence(first: Callable[[jax.Array], jax.Array], place: jax.Array, N_seq: int) -> jax.Array:
    """Of N_seq sequences, each of which begins at place `first(n)`, the last one that does not begin past `place`."""
    low, high = jnp.int32(0), jnp.int32(N_seq)
    for _ in range(max(N_seq - 1, 0).bit_length()):
        middle = lax.div(low + high, jnp.int32(2))
        here = first(middle) <= place
        low, high = jnp.where(here, middle, low), jnp.where(here, high, middle)
    return low


def clear_rows(ref: Any, length: jax.Array) -> None:
    """Rows of a tile (as wgmma sees it) at or past `length` become zero: they are other sequences' tokens, and may be NaN."""

    @when(length < ROWS)
    def _():
        for k in range(ref.shape[0]):
            rows = load(ref.at[k], layout=LAYOUT)
            ref.at[k][...] = jnp.where(indices(0) < length, rows, jnp.zeros_like(rows))
        plgpu.commit_smem()


def store_rows(tile: Any, target: Any, first: jax.Array, count: jax.Array) -> None:
    """The first `count` rows of a tile without a swizzle to rows of `target` from `first` on."""

    def copy(at: Any, size: int) -> None:
        plgpu.copy_smem_to_gmem(tile.at[pl.ds(at, size)], target.at[pl.ds(first + at, size)])

    copy_rows(copy, count)
