"""The Mosaic GPU kernel of `chunk_scan`: a warpgroup computes 64 tokens by 64 channels of y."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._branches import when
from .._numerics import exp, silu
from ._call import Static
from ._tiles import (
    ACC,
    ACROSS,
    COLUMNS,
    DOWN,
    LAYOUT,
    ROWS,
    across,
    clear_rows,
    down,
    fetch,
    indices,
    load,
    locate,
    store_rows,
    tile,
)


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
    static: Static, CB: jax.Array, x: jax.Array, dt: jax.Array, dA_cumsum: jax.Array, C: jax.Array, states: jax.Array,
    D: jax.Array | None, z: jax.Array | None, cu_seqlens: jax.Array | None,
) -> jax.Array:  # fmt: skip
    dims = static.dims
    # The state is an operand of the tensor cores, in C's dtype.
    arrays = {"CB": CB, "x": x, "dt": dt, "dA": dA_cumsum, "C": C, "states": states.astype(C.dtype)}
    arrays |= {"D": D, "z": z, "cu_seqlens": cu_seqlens}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    parts, pieces = dims.P // ROWS, dims.N // COLUMNS
    across_rows, heads_each = dims.L // ROWS, dims.H // dims.G

    def body(*refs: Any) -> None:
        ref = dict(zip(arrays, refs, strict=False))
        y, CB_s, x_s, C_s, S_s, y_s, wide, barriers = refs[len(arrays) :]
        block = lax.axis_index("block")
        part, i, h = block % parts, block // parts % across_rows, block // (parts * across_rows) % dims.H
        slot = block // (parts * across_rows * dims.H) % dims.NC
        b, g = block // (parts * across_rows * dims.H * dims.NC), h // heads_each
        channels, rows = pl.ds(part * ROWS, ROWS), pl.ds(i * ROWS, ROWS)
        where = locate(dims, ref.get("cu_seqlens"), b, slot)
        first, here = where.begin + i * ROWS, where.length - i * ROWS

        @when(here > 0)
        def _():
            fetch(ref["C"].at[b, pl.ds(first, ROWS), g], C_s, wide.at[0])
            fetch(ref["states"].at[b, slot, h, channels], S_s, wide.at[1])
            a = load(ref["dA"].at[b, h, slot, rows], layout=DOWN)
            plgpu.barrier_wait(wide.at[0])
            plgpu.barrier_wait(wide.at[1])

            def carried(accumulator: Any) -> jax.Array:
                for k in range(pieces):
                    plgpu.wgmma(accumulator, C_s[1].at[k], S_s[1].at[k].transpose((1, 0)))
                return accumulator[...]

            y_rows = pl.run_scoped(carried, ACC((ROWS, ROWS), jnp.float32)) * down(exp(a), ROWS)

            def some(j: jax.Array, y_rows: jax.Array) -> jax.Array:
                columns = pl.ds(j * ROWS, ROWS)
                tokens = pl.ds(where.begin + j * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(ref["CB"].at[b, slot, g, rows, columns], CB_s, barriers.at[0])
                fetch(ref["x"].at[b, tokens, h, channels], x_s, barriers.at[1])
                difference = down(a, ROWS) - across(load(ref["dA"].at[b, h, slot, columns], layout=ACROSS), ROWS)
                weight = exp(jnp.minimum(difference, 0.0))
                weight = weight * across(load(ref["dt"].at[b, h, slot, columns], layout=ACROSS), ROWS)
                plgpu.barrier_wait(barriers.at[0])
                scores = load(CB_s, layout=LAYOUT) * weight
                # All threads have read it before the next copy into it.
                plgpu.commit_smem()
                real = (indices(0) + (i - j) * ROWS >= indices(1)) & (indices(1) + j * ROWS < where.length)
                scores = jnp.where(real, scores, 0.0).astype(x.dtype)
                plgpu.barrier_wait(barriers.at[1])
                clear_rows(x_s[1], where.length - j * ROWS)

                def product(accumulator: Any) -> jax.Array:
                    plgpu.wgmma(accumulator, scores, x_s[1].at[0])
                    return accumulator[...]

                return y_rows + pl.run_scoped(product, ACC((ROWS, ROWS), jnp.float32))

            y_rows = lax.fori_loop(0, i + 1, some, y_rows)
            # The last tile of x is that of these tokens.
            if "D" in ref:
                if len(ref["D"].shape) == 2:
                    skip = across(load(ref["D"].at[h, channels], layout=ACROSS).astype(jnp.float32), ROWS)
                else:
                    skip = ref["D"][h].astype(jnp.float32)
                y_rows = y_rows + load(x_s[1].at[0], layout=LAYOUT).astype(jnp.float32) * skip
            if "z" in ref:
                plgpu.copy_gmem_to_smem(ref["z"].at[b, pl.ds(first, ROWS), h, channels], y_s, barriers.at[2])
                plgpu.barrier_wait(barriers.at[2])
                y_rows = y_rows * silu(load(y_s, layout=LAYOUT).astype(jnp.float32))
            y_s[...] = y_rows.astype(x.dtype)
            plgpu.commit_smem()
            _store(y_s, y.at[b, :, h, channels], first, jnp.minimum(here, ROWS))

        if dims.packed:
            _zero_padding(dims, ref["cu_seqlens"], y_s, y.at[b, :, h, channels], slot, i)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[
            plgpu.SMEM((ROWS, ROWS), jnp.float32), tile(COLUMNS, x.dtype), tile(dims.N, x.dtype), tile(dims.N, x.dtype),
            plgpu.SMEM((ROWS, ROWS), x.dtype),
            plgpu.Barrier(num_arrivals=pieces, num_barriers=2), plgpu.Barrier(num_barriers=3),
        ],
        grid=(dims.B * dims.NC * dims.H * across_rows * parts,),
        grid_names=("block",),
        kernel_name="ssd_chunk_scan",
    )  # fmt: skip
    return kernel(*arrays.values())


def _store(rows: Any, y: Any, first: jax.Array, count: jax.Array) -> None:
    """The first `count` rows, for those after them belong to another sequence."""

    @when(count == ROWS)
    def _():
        plgpu.copy_smem_to_gmem(rows, y.at[pl.ds(first, ROWS)])

    when(count < ROWS)(lambda: store_rows(rows, y, first, count))
    plgpu.wait_smem_to_gmem(0)


def _zero_padding(dims: Any, cu_seqlens: Any, rows: Any, y: Any, slot: jax.Array, i: jax.Array) -> None:
    """Tokens past the last sequence: the tile of them that a block would have if the sequences began at token 0."""
    end = jnp.clip(cu_seqlens[dims.N_seq], 0, dims.T) if dims.N_seq else 0
    first = jnp.maximum(slot * dims.L + i * ROWS, end)
    count = jnp.minimum(dims.T, slot * dims.L + (i + 1) * ROWS) - first

    @when(count > 0)
    def _():
        rows[...] = plgpu.layout_cast(jnp.zeros((ROWS, ROWS), rows.dtype), LAYOUT)
        plgpu.commit_smem()
        _store(rows, y, first, count)
