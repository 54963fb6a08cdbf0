"""What a segment of chunks does to a state, S -> T·S + E, without outputs, for all but the last segment of a sequence.

The columns of T are what becomes of the identity's where no v is written, those of E what becomes of zeros: both go through the
chunks as the state does in `_fused_loop`, with the same roundings.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._branches import when
from .._by_lane import BY_LANE
from ..ssd._fused_tiles import operand, rem
from ..ssd._tiles import ACC, ACROSS, COLUMNS, LAYOUT, ROWS, across, indices, load, tiles
from ._fused_loop import Loop
from ._fused_shape import CHUNK, KEY, LEFT, Shape


def run(shape: Shape, arrays: dict[str, jax.Array]) -> jax.Array:
    """[segments, H_v, V + K, K]: E^T and T^T; for a sequence's last segment nothing is written.

    `arrays`: k and v as the caller has them, what `_fused_prepare` writes, and cu_seqlens where sequences are packed.
    """
    dims, stages, widths, dtype = shape.static.dims, shape.stages, shape.widths, shape.dtype
    parts = shape.parts + shape.widths
    scratch = {
        "k_s": tiles(stages, widths, dtype=dtype),
        "v_s": tiles(stages, dtype=dtype),
        "Y_s": operand(stages, widths, dtype=dtype),
        "weights_s": plgpu.SMEM((stages, 3, CHUNK), jnp.float32),
        # Tiles of k and v, then Y and the weights.
        "full": plgpu.Barrier(num_arrivals=widths + 1 + 2, num_barriers=stages),
        "empty": plgpu.Barrier(num_barriers=stages),
    }
    arrays = {name: arrays[name] for name in ("k", "v", "tiles", "weights", "cu_seqlens") if name in arrays}
    # The last states of these columns are what is wanted.
    names = (*arrays, "final", *scratch)

    def body(*refs: Any) -> None:
        named = {"cu_seqlens": None} | dict(zip(names, refs, strict=True))
        _Ends(shape, named, parts).run()

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((shape.segments, dims.H_v, dims.V + dims.K, dims.K), jnp.float32),
        scratch_types=list(scratch.values()),
        grid=(shape.segments * dims.H_v * parts,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="gdn_ends",
        compiler_params=BY_LANE,
    )(*arrays.values())


class _Ends(Loop):
    """Of a segment and of one value head's 64 columns of [E | T]."""

    def run(self) -> None:
        when(jnp.logical_not(self.segment.last))(self.work)

    def feed(self) -> None:
        stages, count = self.shape.stages, self.count

        def free(c: jax.Array) -> None:
            plgpu.barrier_wait(self.refs.empty.at[rem(c, stages)])

        def step(c: jax.Array, _: None) -> None:
            free(c)
            self.fetch(c)

        lax.fori_loop(jnp.int32(0), jnp.minimum(count, stages), lambda c, _: self.fetch(c), None)
        lax.fori_loop(jnp.int32(stages), count, step, None)
        lax.fori_loop(jnp.maximum(count - stages, 0), count, lambda c, _: free(c), None)

    def fetch(self, c: jax.Array) -> None:
        self.fetch_keys(c, self.refs.k, self.refs.k_s)
        # What T's columns get is not used.
        self.fetch_values(c, pl.ds(jnp.minimum(self.part, self.shape.parts - 1) * COLUMNS, COLUMNS))
        self.fetch_prepared(c)

    def before(self) -> tuple[jax.Array, ...]:
        row = indices(0) + (self.part - self.shape.parts) * COLUMNS
        return tuple(jnp.where(row == indices(1) + k * COLUMNS, 1.0, 0.0) for k in range(self.shape.widths))

    def step(self, c: jax.Array, S: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        refs, shape, dtype = self.refs, self.shape, self.shape.dtype
        at = rem(c, shape.stages)
        plgpu.barrier_wait(refs.full.at[at])

        def products(known: Any, *ends: Any) -> tuple[jax.Array, ...]:
            left = refs.weights_s[at, LEFT, 0]
            operands = [s.astype(dtype) for s in S]
            for s, end in zip(S, ends, strict=True):
                end[...] = s * left
            for k, s in enumerate(operands):
                plgpu.wgmma(known, s, refs.k_s[1].at[at, k].transpose((1, 0)))
            v = load(refs.v_s[1].at[at].transpose((1, 0)), layout=LAYOUT).astype(jnp.float32)
            v = jnp.where(self.part < shape.parts, v, 0.0)
            b = load(refs.weights_s.at[at, KEY], layout=ACROSS)
            r = (v - plgpu.wgmma_accumulator_load(known) * across(b, ROWS)).astype(dtype)
            for k, end in enumerate(ends):
                plgpu.wgmma(end, r, refs.Y_s.at[at, k])
            return tuple(end[...] for end in ends)

        tile = ACC((ROWS, COLUMNS), jnp.float32)
        S = pl.run_scoped(products, tile, *[tile] * shape.widths)
        plgpu.barrier_arrive(refs.empty.at[at])
        return S
