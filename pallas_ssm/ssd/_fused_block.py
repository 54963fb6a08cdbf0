"""What a thread block of the fused kernels works on, and the warpgroup that feeds the others.

The feeding warpgroup brings tiles of 64 tokens by TMA, `stages` chunks ahead, and turns their dt into what the decay is made
of: with d the step and a the sum of d·A·log2 e up to a token of the chunk (a_last: to its end),

    a[i]     b[j] = a[j] - log2 d[j]     exp2(a[i])     exp2(a_last - b[j])

so that exp2(a[i] - b[j]) is the decay from token j to i times the step at j. Where there is no token d is 0: b is infinite, and
all that is made of it exactly zero. A warpgroup sums 64 numbers with a triangle of ones, held in registers.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._numerics import LOG2E, softplus
from ._combined_call import Static
from ._fused_pieces import CHUNK, Cut, Piece, locate
from ._fused_tiles import rem
from ._tiles import ACROSS, COLUMNS, DOWN, LAYOUT, ROWS, across, indices, load, store_rows

# dt comes for so many heads (TMA takes no less than 16 bytes of a row) and chunks at a time.
DT_HEADS, DT_CHUNKS = 8, 4
# Rows of a chunk's `vectors`.
A, B, GROWN, WEIGHT = range(4)


@dataclass(frozen=True)
class Shape:
    """Sizes that are known when a kernel is traced."""

    static: Static
    cut: Cut
    stages: int
    """Chunks in shared memory."""
    scores: int = 0
    """Warpgroups that compute the products within a chunk."""

    @property
    def parts(self) -> int:
        """Thread blocks of a head: each has 64 of its P channels."""
        return -(-self.static.dims.P // COLUMNS)

    @property
    def widths(self) -> int:
        """[64, 64] tiles of B and C."""
        return self.static.dims.N // COLUMNS

    def blocks(self, slots: int) -> int:
        return self.static.dims.B * slots * self.static.dims.H * self.parts


class Block:
    """One head's 64 channels of one piece. `refs`: arrays and shared memory by name, None where there is none."""

    def __init__(self, shape: Shape, slots: int, refs: dict[str, Any]):
        self.shape, self.static, self.dims = shape, shape.static, shape.static.dims
        self.refs = SimpleNamespace(**refs)
        heads = self.dims.H * shape.parts
        block = lax.axis_index("block")
        head, slot = rem(block, heads), lax.div(block, jnp.int32(heads))
        self.h, self.part = lax.div(head, jnp.int32(shape.parts)), rem(head, shape.parts)
        self.g = lax.div(self.h, jnp.int32(self.dims.H // self.dims.G))
        self.channels = pl.ds(self.part * COLUMNS, COLUMNS)
        b, slot = lax.div(slot, jnp.int32(slots)), rem(slot, slots)
        self.piece: Piece = locate(self.static, shape.cut, self.refs.cu_seqlens, b, slot)
        self.count = self.piece.chunks

    def token(self, c: Any) -> jax.Array:
        return self.piece.begin + c * CHUNK

    def left(self, c: Any) -> jax.Array:
        """Tokens from chunk c on."""
        return self.piece.length - c * CHUNK

    @property
    def may_end_short(self) -> bool:
        """Whether rows behind the last token may be other sequences'. (TMA zero-fills behind the arrays' own end.)"""
        return self.dims.packed or (self.static.chunk_aligned and self.dims.T % CHUNK != 0)

    # The feeding warpgroup.

    def feed(self) -> None:
        """Brings every chunk, and sends off y where there is one."""
        refs, shape, count = self.refs, self.shape, self.count
        stores = hasattr(refs, "y_s")
        self.rate = refs.A[self.h].astype(jnp.float32) * LOG2E
        self.triangle = jnp.where(indices(0) >= indices(1), 1.0, 0.0)
        for group in range(2):
            pl.when(group * DT_CHUNKS < count)(lambda group=group: self.fetch_dt(jnp.int32(group)))
        for c in range(shape.stages):
            pl.when(c < count)(lambda c=c: self.fetch(jnp.int32(c)))

        def step(c: jax.Array, _: None) -> None:
            d = self.steps(c)
            da_s = refs.da_s.at[rem(c, 2)]
            da_s[...] = d * self.rate
            again = c >= shape.stages
            pl.when(again)(lambda: plgpu.barrier_wait(refs.empty.at[rem(c, shape.stages)]))
            # One fence for all: what the warpgroup has written, what has been read where TMA will write, y.
            plgpu.commit_smem()
            if stores:
                pl.when(again)(lambda: self.store(c - shape.stages))
            pl.when(again)(lambda: self.fetch(c))
            group = lax.div(c, jnp.int32(DT_CHUNKS)) + 1
            more = (c > 0) & (rem(c, DT_CHUNKS) == 0) & (group * DT_CHUNKS < count)
            pl.when(more)(lambda: self.fetch_dt(group))
            self.vectors(c, d, load(da_s, layout=ACROSS))

        lax.fori_loop(jnp.int32(0), count, step, None)

        def drain(c: jax.Array, _: None) -> None:
            plgpu.barrier_wait(refs.empty.at[rem(c, shape.stages)])
            if stores:
                plgpu.commit_smem()
                self.store(c)

        lax.fori_loop(jnp.maximum(count - shape.stages, 0), count, drain, None)
        if stores:
            plgpu.wait_smem_to_gmem(0)

    def fetch_dt(self, group: jax.Array) -> None:
        refs, slot = self.refs, rem(group, 2)
        tokens = pl.ds(self.token(group * DT_CHUNKS), DT_CHUNKS * CHUNK)
        heads = pl.ds(lax.div(self.h, jnp.int32(DT_HEADS)) * DT_HEADS, DT_HEADS)
        plgpu.copy_gmem_to_smem(refs.dt.at[self.piece.b, tokens, heads], refs.dt_s.at[slot], refs.dt_full.at[slot])

    def steps(self, c: jax.Array) -> jax.Array:
        """A chunk's steps, 0 where there is no token."""
        static, refs = self.static, self.refs
        slot, at = rem(lax.div(c, jnp.int32(DT_CHUNKS)), 2), rem(c, DT_CHUNKS)
        pl.when(at == 0)(lambda: plgpu.barrier_wait(refs.dt_full.at[slot]))
        d = load(refs.dt_s.at[slot, pl.ds(at * CHUNK, CHUNK)], layout=LAYOUT).astype(jnp.float32)
        d = jnp.sum(jnp.where(indices(1, DT_HEADS) == rem(self.h, DT_HEADS), d, 0.0), axis=1)
        if refs.dt_bias is not None:
            d = d + refs.dt_bias[self.h].astype(jnp.float32)
        if static.dt_softplus:
            d = softplus(d)
        low, high = static.dt_limit
        if low > 0:
            d = jnp.maximum(d, low)
        if high < float("inf"):
            d = jnp.minimum(d, high)
        token = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=DOWN)
        return jnp.where(token < self.left(c), d, 0.0)

    def fetch(self, c: jax.Array) -> None:
        refs, piece, slot = self.refs, self.piece, rem(c, self.shape.stages)
        rows, full = pl.ds(piece.row + c * CHUNK, ROWS), refs.full.at[slot]
        plgpu.copy_gmem_to_smem(refs.x.at[piece.b, rows, self.h, self.channels], refs.x_s[0].at[slot], full)
        operands = [(refs.B, refs.B_s)] + ([(refs.C, refs.C_s)] if hasattr(refs, "C_s") else [])
        for source, tiles in operands:
            for k in range(self.shape.widths):
                columns = source.at[piece.b, rows, self.g, pl.ds(k * COLUMNS, COLUMNS)]
                plgpu.copy_gmem_to_smem(columns, tiles[0].at[slot, k], full)
        if getattr(refs, "z_s", None) is not None:
            tokens = pl.ds(self.token(c), CHUNK)
            plgpu.copy_gmem_to_smem(refs.z.at[piece.b, tokens, self.h, self.channels], refs.z_s[0].at[slot], full)

    def vectors(self, c: jax.Array, d: jax.Array, da: jax.Array) -> None:
        refs, slot = self.refs, rem(c, self.shape.stages)
        da = across(da, ROWS)
        a, last = jnp.sum(da * self.triangle, axis=1), jnp.sum(da, axis=1)
        b = a - jnp.log2(d)
        refs.v_s[slot, A] = a
        refs.v_s[slot, B] = b
        refs.v_s[slot, GROWN] = jnp.exp2(a)
        refs.v_s[slot, WEIGHT] = jnp.exp2(last - b)
        plgpu.barrier_arrive(refs.full.at[slot])

    def store(self, c: jax.Array) -> None:
        """y of chunk c, which is in shared memory, to where it belongs."""
        refs, buffer = self.refs, rem(c, 2)
        rows = refs.y.at[self.piece.b, :, self.h, self.channels]
        first, left = self.token(c), self.left(c)

        # The buffer before this one may be written again when it has been read.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when((c > 0) & (c + 1 < self.count))(lambda: plgpu.barrier_arrive(refs.y_free.at[rem(c + 1, 2)]))

        def whole() -> None:
            plgpu.copy_smem_to_gmem(refs.y_s[0].at[buffer], rows.at[pl.ds(first, ROWS)])

        if not self.dims.packed:
            whole()
            return
        pl.when(left >= CHUNK)(whole)
        pl.when(left < CHUNK)(lambda: store_rows(refs.y_s[2].at[buffer], rows, first, left))
