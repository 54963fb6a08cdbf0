"""The Mosaic GPU kernel of `bmm_chunk`: a warpgroup multiplies 64 tokens of a chunk with all of it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._branches import when
from ._call import Static
from ._tiles import ACC, COLUMNS, ROWS, fetch, indices, locate, tile


def unsupported(static: Static, dtype: str) -> str | None:
    if dtype == "float32":
        return "takes 16-bit inputs, got float32"
    if static.dims.L < ROWS:
        return f"needs chunk_size >= {ROWS}, got {static.dims.L}"
    if static.dims.N % COLUMNS or static.dims.N > 256:
        return f"needs N in multiples of {COLUMNS} up to 256, got {static.dims.N}"
    return None


def run(static: Static, C: jax.Array, B: jax.Array, cu_seqlens: jax.Array | None) -> jax.Array:
    dims = static.dims
    given = [] if cu_seqlens is None else [cu_seqlens]
    across = dims.L // ROWS

    def body(C: Any, B: Any, *refs: Any) -> None:
        bounds = refs[0] if given else None
        out, rows_s, columns_s, out_s, barriers = refs[len(given) :]
        block = lax.axis_index("block")
        i, g, slot = block % across, block // across % dims.G, block // (across * dims.G) % dims.NC
        b = block // (across * dims.G * dims.NC)
        where = locate(dims, bounds, b, slot)

        @when(where.length > 0)
        def _():
            # Rows past the last token of all are zeros to TMA.
            fetch(C.at[b, pl.ds(where.begin + i * ROWS, ROWS), g], rows_s, barriers.at[0])
            plgpu.barrier_wait(barriers.at[0])

            def some(j: jax.Array, _: None) -> None:
                fetch(B.at[b, pl.ds(where.begin + j * ROWS, ROWS), g], columns_s, barriers.at[1])
                plgpu.barrier_wait(barriers.at[1])

                def product(accumulator: Any) -> jax.Array:
                    for k in range(dims.N // COLUMNS):
                        plgpu.wgmma(accumulator, rows_s[1].at[k], columns_s[1].at[k].transpose((1, 0)))
                    return accumulator[...]

                products = pl.run_scoped(product, ACC((ROWS, ROWS), jnp.float32))
                real = (indices(0) + i * ROWS < where.length) & (indices(1) + j * ROWS < where.length)
                plgpu.wait_smem_to_gmem(0)
                out_s[...] = jnp.where(real, products, 0.0)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s, out.at[b, slot, g, pl.ds(i * ROWS, ROWS), pl.ds(j * ROWS, ROWS)])

            lax.fori_loop(0, across, some, None)
            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((dims.B, dims.NC, dims.G, dims.L, dims.L), jnp.float32),
        scratch_types=[
            tile(dims.N, C.dtype),
            tile(dims.N, C.dtype),
            plgpu.SMEM((ROWS, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=dims.N // COLUMNS, num_barriers=2),
        ],
        grid=(dims.B * dims.NC * dims.G * across,),
        grid_names=("block",),
        kernel_name="ssd_bmm_chunk",
    )
    return kernel(C, B, *given)
