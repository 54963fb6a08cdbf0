"""The second kernel: the state of one value head's 64 columns through a sequence's chunks, and the outputs on the way.

Two warpgroups, tied by barriers and never to the block as a whole:

    carry   S^T [64, K] in fp32 registers; with h the state before the chunk, rounded, and by `_fused_prepare` the chunk's
            PX, Y and weights a, b and c
                r^T = v^T - b·(h^T k^T)     what the state before does not know of v
                o^T = a·(h^T q^T) + r^T PX^T
                S^T = c·S^T + r^T Y
    feed    tiles of the caller's and of `_fused_prepare`'s by TMA, `stages` chunks ahead, and o out

Transposed, the state and r are left operands, which wgmma takes from registers: neither passes through shared memory.
What is rounded to q's dtype: h, r and o.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._branches import choose_role, either, when
from .._by_lane import BY_LANE
from ..ssd._fused_tiles import operand, rem
from ..ssd._tiles import ACC, ACROSS, COLUMNS, LAYOUT, ROWS, across, indices, load, store_rows, tiles
from ._fused_shape import CHUNK, KEY, LEFT, QUERY, Shape


def run(shape: Shape, arrays: dict[str, jax.Array], outputs: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """`arrays`: q, k and v as the caller has them, what `_fused_prepare` writes, initial_state [N,H_v,V,K] and cu_seqlens
    where there are any. `outputs`: o, and final [N,H_v,V,K] where it is wanted. N: all segments.
    """
    stages, widths, dtype = shape.stages, shape.widths, shape.dtype
    scratch = {
        "q_s": tiles(stages, widths, dtype=dtype),
        "k_s": tiles(stages, widths, dtype=dtype),
        "v_s": tiles(stages, dtype=dtype),
        "Y_s": operand(stages, widths, dtype=dtype),
        "PX_s": operand(stages, dtype=dtype),
        "weights_s": plgpu.SMEM((stages, 3, CHUNK), jnp.float32),
        "o_s": tiles(stages, dtype=dtype, linear=True),
        # Tiles of q, k and v, then Y, PX and the weights; the last arrival: o's tile has been read, and may be written again.
        "full": plgpu.Barrier(num_arrivals=2 * widths + 1 + 3 + 1, num_barriers=stages),
        "empty": plgpu.Barrier(num_barriers=stages),
    }
    names = (*arrays, *outputs, *scratch)

    def body(*refs: Any) -> None:
        named = dict.fromkeys(("initial_state", "cu_seqlens", "final"))
        Loop(shape, named | dict(zip(names, refs, strict=True)), shape.parts).run()

    results = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        grid=(shape.loop_blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="gdn_loop",
        compiler_params=BY_LANE,
    )(*arrays.values())
    return dict(zip(outputs, results, strict=True))


class Loop:
    """One segment of 64 columns, of which a value head has `parts`. `refs`: arrays and shared memory by name, or None."""

    def __init__(self, shape: Shape, refs: dict[str, Any], parts: int):
        self.shape, self.dims = shape, shape.static.dims
        self.refs = SimpleNamespace(**refs)
        dims, heads = self.dims, self.dims.H_v * parts
        block = lax.axis_index("block")
        head, self.n = rem(block, heads), lax.div(block, jnp.int32(heads))
        self.h, self.part = lax.div(head, jnp.int32(parts)), rem(head, parts)
        self.h_k = lax.div(self.h, jnp.int32(dims.H_v // dims.H_k))
        self.columns = pl.ds(self.part * COLUMNS, COLUMNS)
        self.segment = shape.locate(self.refs.cu_seqlens, self.n)
        self.b, self.begin, self.slot = self.segment.b, self.segment.begin, self.segment.slot
        self.length = self.segment.length
        self.count = lax.div(self.length + (CHUNK - 1), jnp.int32(CHUNK))

    def run(self) -> None:
        if self.dims.packed:
            alone = lax.axis_index("warpgroup") == 0
            either(self.n < self.shape.segments, self.work, lambda: when(alone)(self.blank))
        else:
            self.work()

    def work(self) -> None:
        choose_role(lax.axis_index("warpgroup"), [(1, lambda _: self.carry()), (1, lambda _: self.feed())])

    def left(self, c: Any) -> jax.Array:
        """Tokens from chunk c on."""
        return self.length - c * CHUNK

    def blank(self) -> None:
        """Rows of o that are no sequence's become zero."""
        tile = self.refs.o_s[2].at[0]
        tile[...] = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), tile.dtype), LAYOUT)
        plgpu.commit_smem()

        def step(c: jax.Array, _: None) -> None:
            # They reach to the array's end, behind which TMA drops what it is given.
            rows = self.refs.o.at[self.b, pl.ds(self.begin + c * CHUNK, ROWS), self.h, self.columns]
            plgpu.copy_smem_to_gmem(tile, rows)

        lax.fori_loop(jnp.int32(0), self.count, step, None)
        plgpu.wait_smem_to_gmem(0)

    # The feeding warpgroup.

    def feed(self) -> None:
        stages, count = self.shape.stages, self.count

        def first(c: jax.Array, _: None) -> None:
            self.fetch(c)
            plgpu.barrier_arrive(self.refs.full.at[rem(c, stages)])

        def step(c: jax.Array, _: None) -> None:
            self.store(c - stages)
            self.fetch(c)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(self.refs.full.at[rem(c, stages)])

        lax.fori_loop(jnp.int32(0), jnp.minimum(count, stages), first, None)
        lax.fori_loop(jnp.int32(stages), count, step, None)
        lax.fori_loop(jnp.maximum(count - stages, 0), count, lambda c, _: self.store(c), None)
        plgpu.wait_smem_to_gmem(0)

    def fetch(self, c: jax.Array) -> None:
        refs, at = self.refs, rem(c, self.shape.stages)
        self.fetch_keys(c, refs.k, refs.k_s)
        self.fetch_keys(c, refs.q, refs.q_s)
        self.fetch_values(c, self.columns)
        self.fetch_prepared(c)
        PX = refs.tiles.at[self.shape.first("PX") + self.head(c)]
        plgpu.copy_gmem_to_smem(PX, refs.PX_s.at[at], refs.full.at[at])

    def head(self, c: jax.Array) -> jax.Array:
        """The place of this head in chunk c, among all slots'."""
        return (self.slot + c) * self.dims.H_v + self.h

    def rows(self, c: jax.Array) -> Any:
        return pl.ds(self.begin + c * CHUNK, ROWS)

    def fetch_keys(self, c: jax.Array, source: Any, target: Any) -> None:
        at = rem(c, self.shape.stages)
        for i in range(self.shape.widths):
            rows = source.at[self.b, self.rows(c), self.h_k, pl.ds(i * COLUMNS, COLUMNS)]
            plgpu.copy_gmem_to_smem(rows, target[0].at[at, i], self.refs.full.at[at])

    def fetch_values(self, c: jax.Array, columns: Any) -> None:
        refs, at = self.refs, rem(c, self.shape.stages)
        rows = refs.v.at[self.b, self.rows(c), self.h, columns]
        plgpu.copy_gmem_to_smem(rows, refs.v_s[0].at[at], refs.full.at[at])

    def fetch_prepared(self, c: jax.Array) -> None:
        refs, shape, at = self.refs, self.shape, rem(c, self.shape.stages)
        Y = refs.tiles.at[pl.ds(shape.first("Y") + self.head(c) * shape.widths, shape.widths)]
        plgpu.copy_gmem_to_smem(Y, refs.Y_s.at[at], refs.full.at[at])
        plgpu.copy_gmem_to_smem(refs.weights.at[self.head(c)], refs.weights_s.at[at], refs.full.at[at])

    def store(self, c: jax.Array) -> None:
        """o of chunk c to where it belongs, once the chunk is done."""
        refs, at = self.refs, rem(c, self.shape.stages)
        plgpu.barrier_wait(refs.empty.at[at])
        # For what has been written, and for what has been read where TMA will write.
        plgpu.commit_smem()
        rows = refs.o.at[self.b, :, self.h, self.columns]
        first, left = self.begin + c * CHUNK, self.left(c)

        def whole() -> None:
            plgpu.copy_smem_to_gmem(refs.o_s[0].at[at], rows.at[pl.ds(first, ROWS)])

        if not self.dims.packed:
            whole()
            return
        either(left >= CHUNK, whole, lambda: store_rows(refs.o_s[2].at[at], rows, first, left))

    # The state.

    def carry(self) -> None:
        S = lax.fori_loop(jnp.int32(0), self.count, self.step, self.before())
        final = self.refs.final
        if final is not None:
            for k, part in enumerate(S):
                final.at[self.n, self.h, self.columns, pl.ds(k * COLUMNS, COLUMNS)][...] = part

    def before(self) -> tuple[jax.Array, ...]:
        initial = self.refs.initial_state
        if initial is None:
            return (plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), LAYOUT),) * self.shape.widths
        state = initial.at[self.n, self.h, self.columns]
        parts = [state.at[:, pl.ds(k * COLUMNS, COLUMNS)] for k in range(self.shape.widths)]
        return tuple(load(part, layout=LAYOUT).astype(jnp.float32) for part in parts)

    def step(self, c: jax.Array, S: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """One chunk. What later products need is made while earlier ones run; nothing is in flight across the loop's edge."""
        refs, shape, dtype = self.refs, self.shape, self.shape.dtype
        at = rem(c, shape.stages)
        plgpu.barrier_wait(refs.full.at[at])

        def products(known: Any, carried: Any, own: Any, *ends: Any) -> tuple[jax.Array, ...]:
            left = refs.weights_s[at, LEFT, 0]
            operands = [s.astype(dtype) for s in S]
            for s, end in zip(S, ends, strict=True):
                end[...] = s * left
            for k, s in enumerate(operands):
                plgpu.wgmma(known, s, refs.k_s[1].at[at, k].transpose((1, 0)))
            for k, s in enumerate(operands):
                plgpu.wgmma(carried, s, refs.q_s[1].at[at, k].transpose((1, 0)))
            v = load(refs.v_s[1].at[at].transpose((1, 0)), layout=LAYOUT).astype(jnp.float32)
            a, b = (load(refs.weights_s.at[at, row], layout=ACROSS) for row in (QUERY, KEY))
            r = v - plgpu.wgmma_accumulator_load(known, wait_n=len(S)) * across(b, ROWS)
            if shape.may_end_short:
                # What is another sequence's may be NaN, and the state it is compared with infinite.
                r = jnp.where(indices(1) < self.left(c), r, 0.0)
            r = r.astype(dtype)
            plgpu.wgmma(own, r, refs.PX_s.at[at].transpose((1, 0)))
            for k, end in enumerate(ends):
                plgpu.wgmma(end, r, refs.Y_s.at[at, k])
            within = plgpu.wgmma_accumulator_load(own, wait_n=len(ends))
            since = plgpu.wgmma_accumulator_load(carried, wait_n=len(ends))
            self.emit(c, since * across(a, ROWS) + within)
            return tuple(end[...] for end in ends)

        tile = ACC((ROWS, COLUMNS), jnp.float32)
        S = pl.run_scoped(products, tile, tile, tile, *[tile] * shape.widths)
        plgpu.barrier_arrive(refs.empty.at[at])
        return S

    def emit(self, c: jax.Array, o: jax.Array) -> None:
        """o^T of a chunk to shared memory, from where the feeding warpgroup sends it off."""
        refs, at = self.refs, rem(c, self.shape.stages)
        o = o.astype(self.shape.dtype)

        def put(view: int) -> None:
            refs.o_s[view].at[at].transpose((1, 0))[...] = o

        if not self.dims.packed:
            put(1)
            return
        either(self.left(c) >= CHUNK, lambda: put(1), lambda: put(2))
