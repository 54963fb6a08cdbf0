"""What both convolution kernels do with a row: the taps, one step of the sum, loads and stores."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ._causal_conv1d_launch import RowLayout
from ._numerics import LOG2E


def load(ref: Any, layout: Any) -> jax.Array:
    # optimized=False: a plain vector load of what each thread owns.
    return plgpu.load(ref, layout=layout, optimized=False)


def select(where: jax.Array, x: jax.Array, y: jax.Array | float) -> jax.Array:
    """x or y, elementwise; `where` and y may be scalars. (The lowering broadcasts nothing by itself.)"""
    y = jnp.broadcast_to(jnp.asarray(y, x.dtype), x.shape)
    return jnp.where(jnp.broadcast_to(where, x.shape), x, y)


def stage_taps(weight: Any, bias: Any, channels: Any, shared: Any, layout: RowLayout) -> None:
    """The taps, and the bias below them, of some channels into shared memory, in fp32, a row each."""
    write_taps(weight, bias, channels, shared, layout)
    plgpu.commit_smem()


def write_taps(weight: Any, bias: Any, channels: Any, shared: Any, layout: RowLayout) -> None:
    """`stage_taps` without the barrier that `load_taps` needs.

    A thread needs the taps of neighbouring channels, which lie `width` elements apart: too far for a vector.
    """
    rows = [weight.at[channels, j] for j in range(weight.shape[1])]
    if bias is not None:
        rows.append(bias.at[channels])
    # All are asked for before the first is waited for. Pointers are generic here, so that no load may pass a store.
    for j, row in enumerate([load(row, layout.scalars) for row in rows]):
        shared[j] = row.astype(jnp.float32)


def load_taps(width: int, bias: Any, shared: Any, layout: RowLayout) -> tuple[list[jax.Array], jax.Array | None]:
    """(taps, bias), each [rows of the layout, channels]."""

    def over_rows(j: int) -> jax.Array:
        row = load(shared.at[j], layout.row)
        return plgpu.layout_cast(lax.broadcast_in_dim(row, (layout.rows, *row.shape), (1,)), layout.tile)

    return [over_rows(j) for j in range(width)], None if bias is None else over_rows(width)


def convolve(window: Sequence[jax.Array], taps: Sequence[jax.Array], bias: jax.Array | None, silu: bool) -> jax.Array:
    """One row of y in fp32: the taps on the last len(taps) inputs, oldest first."""
    y = window[0] * taps[0] if bias is None else bias + window[0] * taps[0]
    for x, tap in zip(window[1:], taps[1:], strict=True):
        y = y + x * tap
    # x / u is four instructions more than x · rsqrt(u)², which is off by 2^-22 at most. u is 1 or more; where it is
    # infinite, both give zero.
    return y * lax.square(lax.rsqrt(1.0 + jnp.exp2(y * -LOG2E))) if silu else y
