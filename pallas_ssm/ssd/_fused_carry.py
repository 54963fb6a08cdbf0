"""The warpgroup of the fused kernel that carries one head's state through the chunks of a piece, and makes y on the way."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._branches import either, when
from .._numerics import silu
from ._fused_block import GROWN, WEIGHT, Block
from ._fused_pieces import CHUNK
from ._fused_tiles import rem
from ._tiles import ACC, ACROSS, COLUMNS, DOWN, LAYOUT, ROWS, across, down, load

# Buffers for M and for y.
BUFFERS = 2
# [64, 64] tiles of the state that are operands at a time: more do not fit in registers beside it.
_PAIR = 2


class Carry:
    """Of a block's head i, which the warpgroup tells: one piece of code for all heads."""

    def __init__(self, block: Block, i: Any):
        self.block, self.shape, self.refs, self.piece = block, block.shape, block.refs, block.piece
        self.i, self.h = i, block.heads[0] + i

    def run(self) -> None:
        S = lax.fori_loop(jnp.int32(0), self.block.count, partial(self.step, self.skip()), self.before())
        refs, piece = self.refs, self.piece
        if refs.final is not None:
            when(piece.last)(lambda: self.put(refs.final.at[piece.n], S))

    def tile(self, states: Any, k: int) -> Any:
        return states.at[self.h, self.block.channels, pl.ds(k * COLUMNS, COLUMNS)]

    def put(self, states: Any, S: tuple[jax.Array, ...]) -> None:
        for k, part in enumerate(S):
            self.tile(states, k)[...] = part.astype(states.dtype)

    def get(self, states: Any) -> tuple[jax.Array, ...]:
        widths = range(self.shape.widths)
        return tuple(load(self.tile(states, k), layout=LAYOUT).astype(jnp.float32) for k in widths)

    def before(self) -> tuple[jax.Array, ...]:
        """The state that the piece begins with."""
        refs, piece = self.refs, self.piece
        if refs.initial_states is None:
            zero = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), LAYOUT)
            S = (zero,) * self.shape.widths
        else:
            S = self.get(refs.initial_states.at[piece.n])
        if not self.shape.cut.several:
            return S

        shares = self.shape.cut.shares

        def add(n: jax.Array, S: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            slot = (piece.slot - piece.k) * shares + n
            decay = jnp.exp2(refs.totals[slot, self.h])
            return tuple(s * decay + end for s, end in zip(S, self.get(refs.ends.at[slot]), strict=True))

        return lax.fori_loop(jnp.int32(0), piece.k * shares, add, S)

    def skip(self) -> jax.Array | None:
        """D of this block's channels."""
        D = self.refs.D
        if D is None:
            return None
        if len(D.shape) == 1:
            return jnp.broadcast_to(D[self.h].astype(jnp.float32), (ROWS, COLUMNS))
        return down(load(D.at[self.h, self.block.channels], layout=DOWN).astype(jnp.float32), COLUMNS)

    def step(self, D: jax.Array | None, c: jax.Array, S: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """One chunk. What later products need is made while earlier ones run; nothing is in flight across the loop's edge."""
        refs, shape, i, dtype = self.refs, self.shape, self.i, jnp.dtype(self.shape.static.dtype)
        slot, buffer = rem(c, shape.stages), rem(c, BUFFERS)
        # Ready: M is there, and so all that it was made of, and x and B are clear.
        plgpu.barrier_wait(refs.ready.at[buffer])

        def inner() -> tuple[jax.Array, ...]:
            x = load(refs.x_s[1].at[slot, i].transpose((1, 0)), layout=LAYOUT)
            return x, *(load(refs.v_s.at[slot, i, row], layout=ACROSS) for row in (GROWN, WEIGHT))

        def products(y: Any, *ends: Any) -> tuple[jax.Array, ...]:
            # On their way while S is multiplied, where there are registers for them beside it.
            early = inner() if len(S) <= _PAIR else None
            decay = refs.v_s[slot, i, GROWN, CHUNK - 1]
            for k in range(0, len(S), _PAIR):
                if k:
                    plgpu.wgmma_wait(0)
                operands = [s.astype(dtype) for s in S[k : k + _PAIR]]
                for s, end in zip(S[k : k + _PAIR], ends[k : k + _PAIR], strict=True):
                    end[...] = s * decay
                for j, s in enumerate(operands):
                    plgpu.wgmma(y, s, refs.C_s[1].at[slot, k + j].transpose((1, 0)))
            if early is None:
                plgpu.wgmma_wait(0)
                early = inner()
            x, grown, weight = early
            # Before the wait, under which nothing else is to do.
            wide = x.astype(jnp.float32)
            weighted = (wide * across(weight, ROWS)).astype(dtype)
            skipped = None if D is None else D * wide
            carried = plgpu.wgmma_accumulator_load(y) * across(grown, ROWS)
            y[...] = carried if skipped is None else carried + skipped
            plgpu.wgmma(y, x, refs.m_s.at[buffer, i])
            for k, end in enumerate(ends):
                plgpu.wgmma(end, weighted, refs.B_s[1].at[slot, k])
            self.emit(c, plgpu.wgmma_accumulator_load(y, wait_n=len(ends)))
            return tuple(end[...] for end in ends)

        tile = ACC((ROWS, COLUMNS), jnp.float32)
        S = pl.run_scoped(products, tile, *[tile] * shape.widths)
        plgpu.barrier_arrive(refs.empty.at[slot])
        if refs.intermediate is not None:
            self.keep(c, S)
        return S

    def emit(self, c: jax.Array, y: jax.Array) -> None:
        """y^T of a chunk to shared memory, from where the feeding warpgroup sends it off."""
        refs, i, slot, buffer = self.refs, self.i, rem(c, self.shape.stages), rem(c, BUFFERS)
        when(c + BUFFERS < self.block.count)(lambda: plgpu.barrier_arrive(refs.free.at[buffer]))
        if refs.z_s is not None:
            y = y * silu(load(refs.z_s[1].at[slot, i].transpose((1, 0)), layout=LAYOUT).astype(jnp.float32))
        y = y.astype(refs.y_s[1].dtype)
        when(c >= BUFFERS)(lambda: plgpu.barrier_wait(refs.y_free.at[buffer]))

        def put(view: int) -> None:
            refs.y_s[view].at[buffer, i].transpose((1, 0))[...] = y

        if not self.shape.static.dims.packed:
            put(1)
            return
        either(self.block.left(c) >= CHUNK, lambda: put(1), lambda: put(2))

    def keep(self, c: jax.Array, S: tuple[jax.Array, ...]) -> None:
        """The state, where a chunk of the caller's ends."""
        piece, each = self.piece, self.shape.static.dims.L // CHUNK
        chunk = piece.k * (self.shape.cut.tokens // CHUNK) + c
        ends = (rem(chunk + 1, each) == 0) | (piece.last & (c == self.block.count - 1))
        slot = piece.base + lax.div(chunk, jnp.int32(each))
        when(ends)(lambda: self.put(self.refs.intermediate.at[piece.b, slot], S))
