"""The Mosaic GPU kernel of `chunk_state`: a warpgroup sums up what 64 channels leave of a chunk, 64 tokens at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._branches import when
from .._numerics import exp
from ._call import Static
from ._tiles import ACC, COLUMNS, DOWN, LAYOUT, ROWS, clear_rows, down, fetch, indices, load, locate, tile


def unsupported(static: Static, dtype: str) -> str | None:
    dims = static.dims
    if dtype == "float32":
        return "takes 16-bit inputs, got float32"
    if dims.L < ROWS:
        return f"needs chunk_size >= {ROWS}, got {dims.L}"
    if dims.P % ROWS:
        return f"needs P in multiples of {ROWS}, got {dims.P}"
    if dims.N % COLUMNS or dims.N > 256:
        return f"needs N in multiples of {COLUMNS} up to 256, got {dims.N}"
    return None


def run(
    static: Static, x: jax.Array, B: jax.Array, dt: jax.Array, dA_cumsum: jax.Array, cu_seqlens: jax.Array | None
) -> jax.Array:
    dims = static.dims
    given = [] if cu_seqlens is None else [cu_seqlens]
    parts, pieces, heads_each = dims.P // ROWS, dims.N // COLUMNS, dims.H // dims.G

    def body(x: Any, B: Any, dt: Any, dA_cumsum: Any, *refs: Any) -> None:
        bounds = refs[0] if given else None
        out, x_s, B_s, x_there, B_there = refs[len(given) :]
        block = lax.axis_index("block")
        channels, h = pl.ds(block % parts * ROWS, ROWS), block // parts % dims.H
        slot, b = block // (parts * dims.H) % dims.NC, block // (parts * dims.H * dims.NC)
        where = locate(dims, bounds, b, slot)

        @when(where.length > 0)
        def _():
            total = dA_cumsum[b, h, slot, dims.L - 1]

            def sums(*accumulators: Any) -> list[jax.Array]:
                def some(block: jax.Array, _: None) -> None:
                    tokens = pl.ds(where.begin + block * ROWS, ROWS)
                    fetch(x.at[b, tokens, h, channels], x_s, x_there)
                    fetch(B.at[b, tokens, h // heads_each], B_s, B_there)
                    rows, here = pl.ds(block * ROWS, ROWS), where.length - block * ROWS
                    a = load(dA_cumsum.at[b, h, slot, rows], layout=DOWN)
                    weight = exp(jnp.minimum(total - a, 0.0)) * load(dt.at[b, h, slot, rows], layout=DOWN)
                    plgpu.barrier_wait(x_there)
                    scaled = (load(x_s[1].at[0], layout=LAYOUT).astype(jnp.float32) * down(weight, COLUMNS)).astype(
                        x.dtype
                    )
                    x_s[1].at[0][...] = jnp.where(indices(0) < here, scaled, jnp.zeros_like(scaled))
                    plgpu.barrier_wait(B_there)
                    clear_rows(B_s[1], here)
                    plgpu.commit_smem()
                    for k, accumulator in enumerate(accumulators):
                        plgpu.wgmma(accumulator, x_s[1].at[0].transpose((1, 0)), B_s[1].at[k])
                    plgpu.wgmma_wait(0)

                lax.fori_loop(0, lax.div(where.length + (ROWS - 1), jnp.int32(ROWS)), some, None)
                return [accumulator[...] for accumulator in accumulators]

            states = pl.run_scoped(sums, *[ACC((ROWS, COLUMNS), jnp.float32)] * pieces)
            for k, state in enumerate(states):
                out.at[b, slot, h, channels, pl.ds(k * COLUMNS, COLUMNS)][...] = state

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((dims.B, dims.NC, dims.H, dims.P, dims.N), jnp.float32),
        scratch_types=[
            tile(COLUMNS, x.dtype),
            tile(dims.N, x.dtype),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=pieces),
        ],
        grid=(dims.B * dims.NC * dims.H * parts,),
        grid_names=("block",),
        kernel_name="ssd_chunk_state",
    )
    return kernel(x, B, dt, dA_cumsum, *given)
