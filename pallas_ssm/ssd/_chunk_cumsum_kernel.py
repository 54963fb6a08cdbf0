"""The Mosaic GPU kernel of `chunk_cumsum`: a warpgroup sums up one head's steps of one chunk, 64 at a time.

Mosaic GPU has no cumulative sum. Each of 64 sums is a row of a triangle instead: all in fp32 registers, half of it zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._branches import when
from .._numerics import softplus
from ._call import Static
from ._tiles import ACROSS, DOWN, ROWS, across, indices, load, locate


def unsupported(static: Static) -> str | None:
    return None if static.dims.L >= ROWS else f"needs chunk_size >= {ROWS}, got {static.dims.L}"


def run(
    static: Static, dt: jax.Array, A: jax.Array, dt_bias: jax.Array | None, cu_seqlens: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(dA_cumsum, dt)."""
    dims = static.dims
    given = {"dt_bias": dt_bias, "cu_seqlens": cu_seqlens}
    given = {name: array for name, array in given.items() if array is not None}
    # A block of steps is read whole; there must be something to read past the last token.
    dt = jnp.pad(dt, ((0, 0), (0, dims.L), (0, 0)))

    def body(dt: Any, A: Any, *refs: Any) -> None:
        inputs, (out_sum, out_step, shared) = dict(zip(given, refs, strict=False)), refs[len(given) :]
        block = lax.axis_index("block")
        h, slot, b = block % dims.H, block // dims.H % dims.NC, block // (dims.H * dims.NC)
        where = locate(dims, inputs.get("cu_seqlens"), b, slot)
        rate = A[h].astype(jnp.float32)
        bias = inputs["dt_bias"][h].astype(jnp.float32) if "dt_bias" in inputs else None
        causal = indices(0) >= indices(1)

        def steps(k: jax.Array) -> jax.Array:
            value = load(dt.at[b, pl.ds(where.begin + k * ROWS, ROWS), h], layout=DOWN).astype(jnp.float32)
            if bias is not None:
                value = value + bias
            if static.dt_softplus:
                value = softplus(value)
            low, high = static.dt_limit
            value = jnp.maximum(value, low)
            if high != float("inf"):
                value = jnp.minimum(value, high)
            token = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=DOWN) + k * ROWS
            return jnp.where(token < where.length, value, 0.0)

        def some(k: jax.Array, total: jax.Array) -> jax.Array:
            value, rows = steps(k), pl.ds(k * ROWS, ROWS)
            out_step[b, h, slot, rows] = value
            # Through shared memory, for a row's thread needs the steps of all columns.
            shared[...] = value * rate
            plgpu.commit_smem()
            sums = jnp.sum(jnp.where(causal, across(load(shared, layout=ACROSS), ROWS), 0.0), axis=1) + total
            out_sum[b, h, slot, rows] = sums
            return total + jnp.sum(value * rate)

        @when(where.length > 0)
        def _():
            lax.fori_loop(0, dims.L // ROWS, some, jnp.float32(0))

    shape = jax.ShapeDtypeStruct((dims.B, dims.H, dims.NC, dims.L), jnp.float32)
    kernel = plgpu.kernel(
        body, out_type=(shape, shape), scratch_types=[plgpu.SMEM((ROWS,), jnp.float32)],
        grid=(dims.B * dims.NC * dims.H,), grid_names=("block",), kernel_name="ssd_chunk_cumsum",
    )  # fmt: skip
    return kernel(dt, A, *given.values())
