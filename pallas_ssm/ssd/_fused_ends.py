"""The state that a share of a piece leaves when it starts from zero, and how much it decays what was before.

    carry    S = exp(a_last)·S + (x·w)^T B over the share's chunks; the sum of a_last
    feed     tiles by TMA, vectors from dt (`_fused_block`)

Nothing here is long enough to fill an SM alone: two heads a thread block overlap.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._branches import when
from .._by_lane import BY_LANE
from ._fused_block import DT_HEADS, GROWN, WEIGHT, A, Block, Shape
from ._fused_pieces import CHUNK
from ._fused_tiles import rem
from ._tiles import ACC, ACROSS, COLUMNS, LAYOUT, ROWS, across, load, tiles

# Registers of a thread.
_CARRY, _FEED = 160, 88


def run(shape: Shape, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(states [shares of all batch rows, H, P in whole parts, N], the logarithms (base 2) of their decays [shares, H])."""
    dims, dtype = shape.static.dims, jnp.dtype(shape.static.dtype)
    if shape.heads > 1:
        # Chunks pass twice as fast as in the scan, and what the scan keeps beside x and B leaves room.
        shape = replace(shape, stages=2 * shape.stages, dt_chunks=2 * shape.dt_chunks)
    slots = dims.B * shape.cut.slots * shape.cut.shares
    outputs = [
        jax.ShapeDtypeStruct((slots, dims.H, shape.parts * COLUMNS, dims.N), jnp.float32),
        jax.ShapeDtypeStruct((slots, dims.H), jnp.float32),
    ]
    scratch = {
        "x_s": tiles(shape.stages, shape.heads, dtype=dtype),
        "B_s": tiles(shape.stages, shape.widths, dtype=dtype),
        "v_s": plgpu.SMEM((shape.stages, shape.heads, 4, CHUNK), jnp.float32),
        "dt_s": plgpu.SMEM((2, shape.dt_chunks * CHUNK, DT_HEADS), arrays["dt"].dtype),
        "da_s": plgpu.SMEM((2, shape.heads, CHUNK), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=1 + shape.heads + shape.widths, num_barriers=shape.stages),
        "empty": plgpu.Barrier(num_arrivals=shape.heads, num_barriers=shape.stages),
        "dt_full": plgpu.Barrier(num_barriers=2),
    }
    names = (*arrays, "ends", "totals", *scratch)

    def body(*refs: Any) -> None:
        named = dict.fromkeys(("dt_bias", "cu_seqlens"))
        _Ends(shape, named | dict(zip(names, refs, strict=True)), shape.cut.shares).run()

    ends, totals = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=list(scratch.values()),
        grid=(shape.blocks(shape.cut.shares),),
        grid_names=("block",),
        num_threads=shape.heads + 1,
        thread_name="warpgroup",
        kernel_name="mamba_chunk_scan_combined_ends",
        compiler_params=BY_LANE,
    )(*arrays.values())
    return ends, totals


class _Ends(Block):
    def run(self) -> None:
        here = (self.piece.length > 0) & jnp.logical_not(self.piece.last)
        if self.dims.packed:
            here = here & (self.piece.n < self.dims.N_seq)
        heads = self.shape.heads
        # Two warpgroups could have 256 each; they are launched with the most that one asks for as an increase.
        launched = 128 if heads == 1 else None
        roles = [(heads, _CARRY, self.carry), (1, _FEED, lambda _: self.feed())]
        when(here)(lambda: self.share_out(roles, launched))

    def carry(self, i: Any) -> None:
        zero = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), LAYOUT)
        start = (zero,) * self.shape.widths, jnp.float32(0)
        S, total = lax.fori_loop(jnp.int32(0), self.count, partial(self.step, i), start)
        slot, h = self.piece.slot, self.heads[0] + i
        for k, part in enumerate(S):
            self.refs.ends.at[slot, h, self.channels, pl.ds(k * COLUMNS, COLUMNS)][...] = part
        when(self.part == 0)(lambda: self.refs.totals.__setitem__((slot, h), total))

    def step(self, i: Any, c: jax.Array, carried: tuple[tuple[jax.Array, ...], jax.Array]) -> Any:
        S, total = carried
        refs, slot, dtype = self.refs, rem(c, self.shape.stages), jnp.dtype(self.static.dtype)
        plgpu.barrier_wait(refs.full.at[slot])

        def product(*ends: Any) -> tuple[jax.Array, ...]:
            x = load(refs.x_s[1].at[slot, i].transpose((1, 0)), layout=LAYOUT).astype(jnp.float32)
            weighted = (x * across(load(refs.v_s.at[slot, i, WEIGHT], layout=ACROSS), ROWS)).astype(dtype)
            decay = refs.v_s[slot, i, GROWN, CHUNK - 1]
            for s, end in zip(S, ends, strict=True):
                end[...] = s * decay
            for k, end in enumerate(ends):
                plgpu.wgmma(end, weighted, refs.B_s[1].at[slot, k])
            return tuple(end[...] for end in ends)

        total = total + refs.v_s[slot, i, A, CHUNK - 1]
        S = pl.run_scoped(product, *[ACC((ROWS, COLUMNS), jnp.float32)] * self.shape.widths)
        plgpu.barrier_arrive(refs.empty.at[slot])
        return S, total
