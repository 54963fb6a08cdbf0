"""What a thread block of the fused kernels works on, and the warpgroup that feeds the others.

The feeding warpgroup brings tiles of 64 tokens by TMA, `stages` chunks ahead, and turns their dt into what the decay is made
of: with d the step and a the sum of d·A·log2 e up to a token of the chunk (a_last: to its end),

    a[i]     b[j] = a[j] - log2 d[j]     exp2(a[i])     exp2(a_last - b[j])

so that exp2(a[i] - b[j]) is the decay from token j to i times the step at j. Where there is no token d is 0: b is infinite, and
all that is made of it exactly zero. A warpgroup sums 64 numbers as rows of a triangle.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._branches import choose_role, either, when
from .._numerics import LOG2E, softplus
from ._combined_call import Static
from ._fused_pieces import CHUNK, Cut, Piece, locate, share
from ._fused_tiles import rem, store_rows_clipped
from ._tiles import ACROSS, COLUMNS, DOWN, LAYOUT, ROWS, across, down, indices, load, store_rows

# dt comes for so many heads at a time: TMA takes no less than 16 bytes of a row.
DT_HEADS = 8
# Rows of a chunk's `vectors`.
A, B, GROWN, WEIGHT = range(4)


@dataclass(frozen=True)
class Shape:
    """Sizes that are known when a kernel is traced."""

    static: Static
    cut: Cut
    stages: int
    """Chunks in shared memory."""
    heads: int
    """Neighbours of one group that a thread block takes together: they share B, C and what is multiplied of them alone."""
    scores: int
    """Warpgroups that compute the products within a chunk."""
    dt_chunks: int
    """dt comes for so many chunks at a time, and for as many ahead."""

    @property
    def parts(self) -> int:
        """Thread blocks of the same heads: each has 64 of their P channels."""
        return -(-self.static.dims.P // COLUMNS)

    @property
    def widths(self) -> int:
        """[64, 64] tiles of B and C."""
        return self.static.dims.N // COLUMNS

    def blocks(self, shares: int = 1) -> int:
        return self.static.dims.B * self.cut.slots * shares * (self.static.dims.H // self.heads) * self.parts


class Block:
    """64 channels of one or two heads in one piece, or in a share of one.

    `refs`: arrays and shared memory by name, None where there is none.
    """

    def __init__(self, shape: Shape, refs: dict[str, Any], shares: int = 1):
        self.shape, self.static, self.dims = shape, shape.static, shape.static.dims
        self.refs = SimpleNamespace(**refs)
        parts = self.dims.H // shape.heads * shape.parts
        block = lax.axis_index("block")
        part, slot = rem(block, parts), lax.div(block, jnp.int32(parts))
        first, self.part = lax.div(part, jnp.int32(shape.parts)) * shape.heads, rem(part, shape.parts)
        self.heads = [first + i for i in range(shape.heads)]
        self.g = lax.div(first, jnp.int32(self.dims.H // self.dims.G))
        self.channels = pl.ds(self.part * COLUMNS, COLUMNS)
        slot, i = lax.div(slot, jnp.int32(shares)), rem(slot, shares)
        b, slot = lax.div(slot, jnp.int32(shape.cut.slots)), rem(slot, shape.cut.slots)
        piece = locate(self.static, shape.cut, self.refs.cu_seqlens, b, slot)
        self.piece: Piece = piece if shares == 1 else share(shape.cut, piece, i)
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

    def share_out(self, roles: list[tuple[int, int, Callable[[Any], None]]], launched: int | None = None) -> None:
        """Runs roles: (warpgroups, registers of a thread, what is run given which of these warpgroups it is).

        `launched`: registers that a thread begins with, if not its part of all.
        """
        launched = launched or 65536 // (128 * sum(count for count, _, _ in roles)) // 8 * 8

        def sized(size: int, role: Callable[[Any], None]) -> Callable[[Any], None]:
            def run(i: Any) -> None:
                plgpu.set_max_registers(size, action="increase" if size >= launched else "decrease")
                role(i)

            return run

        choose_role(lax.axis_index("warpgroup"), [(count, sized(size, role)) for count, size, role in roles])

    # The feeding warpgroup.

    def feed(self, triangle: bool = True) -> None:
        """Brings every chunk, and sends off y where there is one. `triangle`: whether there are registers for one of ones."""
        refs, shape, count, dt_chunks = self.refs, self.shape, self.count, self.shape.dt_chunks
        stores = hasattr(refs, "y_s")
        rates = [refs.A[h].astype(jnp.float32) * LOG2E for h in self.heads]
        biases = [None if refs.dt_bias is None else refs.dt_bias[h].astype(jnp.float32) for h in self.heads]
        # Across the loop; without it numbers are selected anew for each chunk.
        i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=layout) for layout in (DOWN, ACROSS))
        before = down(i, COLUMNS) >= across(j, ROWS)
        ones = jnp.where(before, 1.0, 0.0) if triangle else None

        def summed(da: jax.Array) -> jax.Array:
            da = across(da, ROWS)
            return jnp.sum(jnp.where(before, da, 0.0) if ones is None else da * ones, axis=1)

        for group in range(2):
            when(group * dt_chunks < count)(lambda group=group: self.fetch_dt(jnp.int32(group)))
        for c in range(shape.stages):
            when(c < count)(lambda c=c: self.fetch(jnp.int32(c)))

        def step(c: jax.Array, _: None) -> None:
            d, da_s = self.steps(c, biases), refs.da_s.at[rem(c, 2)]
            for i, rate in enumerate(rates):
                da_s.at[i][...] = d[i] * rate
            again = c >= shape.stages
            when(again)(lambda: plgpu.barrier_wait(refs.empty.at[rem(c, shape.stages)]))
            # One fence for all: what the warpgroup has written, what has been read where TMA will write, y.
            plgpu.commit_smem()
            if stores:
                when(again)(lambda: self.store(c - shape.stages))
            when(again)(lambda: self.fetch(c))
            group = lax.div(c, jnp.int32(dt_chunks)) + 1
            more = (c > 0) & (rem(c, dt_chunks) == 0) & (group * dt_chunks < count)
            when(more)(lambda: self.fetch_dt(group))
            for i in range(shape.heads):
                da = load(da_s.at[i], layout=ACROSS)
                self.vectors(refs.v_s.at[rem(c, shape.stages), i], d[i], summed(da), jnp.sum(da))
            plgpu.barrier_arrive(refs.full.at[rem(c, shape.stages)])

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
        tokens = pl.ds(self.token(group * self.shape.dt_chunks), self.shape.dt_chunks * CHUNK)
        heads = pl.ds(lax.div(self.heads[0], jnp.int32(DT_HEADS)) * DT_HEADS, DT_HEADS)
        plgpu.copy_gmem_to_smem(refs.dt.at[self.piece.b, tokens, heads], refs.dt_s.at[slot], refs.dt_full.at[slot])

    def steps(self, c: jax.Array, biases: list[jax.Array | None]) -> list[jax.Array]:
        """A chunk's steps, 0 where there is no token."""
        refs = self.refs
        slot, at = rem(lax.div(c, jnp.int32(self.shape.dt_chunks)), 2), rem(c, self.shape.dt_chunks)
        when(at == 0)(lambda: plgpu.barrier_wait(refs.dt_full.at[slot]))
        dt = load(refs.dt_s.at[slot, pl.ds(at * CHUNK, CHUNK)], layout=LAYOUT).astype(jnp.float32)
        token = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=DOWN)
        steps = [self.limited(h, dt, bias) for h, bias in zip(self.heads, biases, strict=True)]
        return [jnp.where(token < self.left(c), d, 0.0) for d in steps]

    def limited(self, h: jax.Array, dt: jax.Array, bias: jax.Array | None) -> jax.Array:
        """The steps of head h, one of those that `dt` has."""
        static = self.static
        d = jnp.sum(jnp.where(indices(1, DT_HEADS) == rem(h, DT_HEADS), dt, 0.0), axis=1)
        if bias is not None:
            d = d + bias
        if static.dt_softplus:
            d = softplus(d)
        low, high = static.dt_limit
        if low > 0:
            d = jnp.maximum(d, low)
        if high < float("inf"):
            d = jnp.minimum(d, high)
        return d

    def fetch(self, c: jax.Array) -> None:
        refs, piece, slot = self.refs, self.piece, rem(c, self.shape.stages)
        rows, full = pl.ds(piece.row + c * CHUNK, ROWS), refs.full.at[slot]
        for i, h in enumerate(self.heads):
            plgpu.copy_gmem_to_smem(refs.x.at[piece.b, rows, h, self.channels], refs.x_s[0].at[slot, i], full)
        operands = [(refs.B, refs.B_s)] + ([(refs.C, refs.C_s)] if hasattr(refs, "C_s") else [])
        for source, tiles in operands:
            for k in range(self.shape.widths):
                columns = source.at[piece.b, rows, self.g, pl.ds(k * COLUMNS, COLUMNS)]
                plgpu.copy_gmem_to_smem(columns, tiles[0].at[slot, k], full)
        if getattr(refs, "z_s", None) is not None:
            tokens = pl.ds(self.token(c), CHUNK)
            for i, h in enumerate(self.heads):
                plgpu.copy_gmem_to_smem(refs.z.at[piece.b, tokens, h, self.channels], refs.z_s[0].at[slot, i], full)

    def vectors(self, v_s: Any, d: jax.Array, a: jax.Array, last: jax.Array) -> None:
        """One head's, of a chunk."""
        b = a - jnp.log2(d)
        for row, vector in ((A, a), (B, b), (GROWN, jnp.exp2(a)), (WEIGHT, jnp.exp2(last - b))):
            v_s[row] = vector

    def store(self, c: jax.Array) -> None:
        """y of chunk c, which is in shared memory, to where it belongs."""
        refs, buffer = self.refs, rem(c, 2)
        first, left = self.token(c), self.left(c)

        # The buffers before these may be written again when they have been read.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        when((c > 0) & (c + 1 < self.count))(lambda: plgpu.barrier_arrive(refs.y_free.at[rem(c + 1, 2)]))

        def each(put: Callable[[int, Any], None]) -> None:
            for i, h in enumerate(self.heads):
                put(i, refs.y.at[self.piece.b, :, h, self.channels])

        def whole() -> None:
            each(lambda i, y: plgpu.copy_smem_to_gmem(refs.y_s[0].at[buffer, i], y.at[pl.ds(first, ROWS)]))

        if not self.dims.packed:
            whole()
            return
        either(left >= CHUNK, whole, lambda: self.store_short(buffer, first, left))

    def store_short(self, buffer: jax.Array, first: jax.Array, left: jax.Array) -> None:
        """y of a packed sequence's last chunk, behind which are the next one's rows."""
        for i, h in enumerate(self.heads):
            tile, y = self.refs.y_s[2].at[buffer, i], self.refs.y.at[self.piece.b, :, h]
            if self.dims.P % COLUMNS:
                store_rows_clipped(tile, y, self.part, first, left)
            else:
                store_rows(tile, y.at[:, self.channels], first, left)
