"""The state that each piece but a sequence's last leaves when it starts from zero, and how much it decays what was before.

    carry    S = exp(a_last)·S + (x·w)^T B over the piece's chunks; the sum of a_last
    feed     tiles by TMA, vectors from dt (`_fused_block`)

Two thread blocks share an SM: nothing here is long enough to fill it alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ._fused_block import DT_CHUNKS, DT_HEADS, GROWN, WEIGHT, A, Block, Shape
from ._fused_pieces import CHUNK
from ._fused_tiles import rem
from ._tiles import ACC, ACROSS, COLUMNS, LAYOUT, ROWS, across, load, tiles

_REGISTERS = {"carry": 160, "feed": 88}


def run(shape: Shape, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(states [slots of all batch rows, H, P in whole parts, N], the logarithms (base 2) of their decays [slots, H])."""
    dims, dtype = shape.static.dims, jnp.dtype(shape.static.dtype)
    slots = dims.B * shape.cut.slots
    outputs = [
        jax.ShapeDtypeStruct((slots, dims.H, shape.parts * COLUMNS, dims.N), jnp.float32),
        jax.ShapeDtypeStruct((slots, dims.H), jnp.float32),
    ]
    scratch = {
        "x_s": tiles(shape.stages, dtype=dtype),
        "B_s": tiles(shape.stages, shape.widths, dtype=dtype),
        "v_s": plgpu.SMEM((shape.stages, 4, CHUNK), jnp.float32),
        "dt_s": plgpu.SMEM((2, DT_CHUNKS * CHUNK, DT_HEADS), arrays["dt"].dtype),
        "da_s": plgpu.SMEM((2, CHUNK), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=2 + shape.widths, num_barriers=shape.stages),
        "empty": plgpu.Barrier(num_barriers=shape.stages),
        "dt_full": plgpu.Barrier(num_barriers=2),
    }
    names = (*arrays, "ends", "totals", *scratch)

    def body(*refs: Any) -> None:
        named = dict.fromkeys(("dt_bias", "cu_seqlens"))
        _Ends(shape, shape.cut.slots, named | dict(zip(names, refs, strict=True))).run()

    ends, totals = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=list(scratch.values()),
        grid=(shape.blocks(shape.cut.slots),),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="mamba_chunk_scan_combined_ends",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
    )(*arrays.values())
    return ends, totals


class _Ends(Block):
    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")
        here = (self.piece.length > 0) & jnp.logical_not(self.piece.last)
        if self.dims.packed:
            here = here & (self.piece.n < self.dims.N_seq)
        for i, (role, size) in enumerate(_REGISTERS.items()):

            @pl.when(here & (warpgroup == i))
            def _(role: str = role, size: int = size) -> None:
                plgpu.set_max_registers(size, action="increase" if size > 128 else "decrease")
                getattr(self, role)()

    def carry(self) -> None:
        zero = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), LAYOUT)
        S, total = lax.fori_loop(jnp.int32(0), self.count, self.step, ((zero,) * self.shape.widths, jnp.float32(0)))
        slot = self.piece.slot
        for k, part in enumerate(S):
            self.refs.ends.at[slot, self.h, self.channels, pl.ds(k * COLUMNS, COLUMNS)][...] = part
        pl.when(self.part == 0)(lambda: self.refs.totals.__setitem__((slot, self.h), total))

    def step(self, c: jax.Array, carried: tuple[tuple[jax.Array, ...], jax.Array]) -> Any:
        S, total = carried
        refs, slot, dtype = self.refs, rem(c, self.shape.stages), jnp.dtype(self.static.dtype)
        plgpu.barrier_wait(refs.full.at[slot])

        def product(*ends: Any) -> tuple[jax.Array, ...]:
            x = load(refs.x_s[1].at[slot].transpose((1, 0)), layout=LAYOUT).astype(jnp.float32)
            weighted = (x * across(load(refs.v_s.at[slot, WEIGHT], layout=ACROSS), ROWS)).astype(dtype)
            decay = refs.v_s[slot, GROWN, CHUNK - 1]
            for s, end in zip(S, ends, strict=True):
                end[...] = s * decay
            for k, end in enumerate(ends):
                plgpu.wgmma(end, weighted, refs.B_s[1].at[slot, k])
            return tuple(end[...] for end in ends)

        total = total + refs.v_s[slot, A, CHUNK - 1]
        S = pl.run_scoped(product, *[ACC((ROWS, COLUMNS), jnp.float32)] * self.shape.widths)
        plgpu.barrier_arrive(refs.empty.at[slot])
        return S, total
