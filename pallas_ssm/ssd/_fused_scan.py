"""The fused kernel: y and states of one head's 64 channels in one piece, chunk after chunk, in shared memory and registers.

Warpgroups by what they do, tied by barriers and never to the block as a whole:

    carry    S [64 channels, N] in fp32 registers. y^T = exp(a)·(S C^T) + D·x^T + x^T M^T, S = exp(a_last)·S + (x·w)^T B
    score    M^T = B C^T ∘ decay·dt, masked; one warpgroup, or two in turns
    feed     tiles by TMA, vectors from dt, y out (`_fused_block`)

Transposed, S and x are the left operands, which wgmma takes from registers: the state never passes through shared memory, whose
bandwidth is what the kernel has least of. What is rounded to x's dtype: S, M and x·w as operands; y.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._numerics import silu
from ._fused_block import DT_CHUNKS, DT_HEADS, GROWN, WEIGHT, A, B, Block, Shape
from ._fused_pieces import CHUNK
from ._fused_tiles import clear, operand, rem
from ._tiles import ACC, ACROSS, COLUMNS, DOWN, LAYOUT, ROWS, across, down, indices, load, tiles

# Buffers for M and for y.
_BUFFERS = 2
# [64, 64] tiles of the state that are operands at a time: more do not fit in registers beside it.
_PAIR = 2


def run(shape: Shape, arrays: dict[str, jax.Array], outputs: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """`arrays`: of Floats and Integers, and `ends` and `totals` where a sequence may have several pieces."""
    dtype = jnp.dtype(shape.static.dtype)
    stages, widths = shape.stages, shape.widths
    scratch = {
        "x_s": tiles(stages, dtype=dtype),
        "B_s": tiles(stages, widths, dtype=dtype),
        "C_s": tiles(stages, widths, dtype=dtype),
        **({"z_s": tiles(stages, dtype=dtype)} if "z" in arrays else {}),
        "v_s": plgpu.SMEM((stages, 4, CHUNK), jnp.float32),
        "m_s": operand(_BUFFERS, dtype=dtype),
        "y_s": tiles(_BUFFERS, dtype=dtype, linear=True),
        "dt_s": plgpu.SMEM((2, DT_CHUNKS * CHUNK, DT_HEADS), arrays["dt"].dtype),
        "da_s": plgpu.SMEM((2, CHUNK), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=2 + 2 * widths + ("z" in arrays), num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "ready": plgpu.Barrier(num_barriers=_BUFFERS),
        "free": plgpu.Barrier(num_barriers=_BUFFERS),
        "y_free": plgpu.Barrier(num_barriers=_BUFFERS),
        "dt_full": plgpu.Barrier(num_barriers=2),
    }
    names = (*arrays, *outputs, *scratch)

    def body(*refs: Any) -> None:
        named = dict.fromkeys(("D", "z", "dt_bias", "initial_states", "cu_seqlens", "final", "intermediate", "z_s"))
        _Scan(shape, shape.cut.slots, named | dict(zip(names, refs, strict=True))).run()

    results = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        grid=(shape.blocks(shape.cut.slots),),
        grid_names=("block",),
        num_threads=2 + shape.scores,
        thread_name="warpgroup",
        kernel_name="mamba_chunk_scan_combined",
        compiler_params=plgpu.CompilerParams(
            # A thread reads only what it has written itself or what a barrier has announced.
            unsafe_no_auto_barriers=True,
            approx_math=True,
        ),
    )(*arrays.values())
    return dict(zip(outputs, results, strict=True))


def registers(shape: Shape) -> tuple[int, int, int]:
    """Of a thread of each role. All warpgroups' together are no more than a block gets, or it would wait for them forever."""
    return (240, 136, 128) if shape.scores == 1 else (192, 112, 96)


class _Scan(Block):
    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")
        here = self.piece.length >= 0
        real: Any = True
        if self.dims.packed:
            real = self.piece.n < self.dims.N_seq
            pl.when(here & jnp.logical_not(real) & (warpgroup == 0))(self.blank)
        roles = [self.carry, *(partial(self.score, i) for i in range(self.shape.scores)), self.feed]
        sizes = registers(self.shape)
        launched = 65536 // (128 * len(roles)) // 8 * 8
        for i, role in enumerate(roles):
            size = sizes[0] if i == 0 else sizes[2] if i == len(roles) - 1 else sizes[1]

            @pl.when(here & real & (warpgroup == i))
            def _(role: Any = role, size: int = size) -> None:
                plgpu.set_max_registers(size, action="increase" if size > launched else "decrease")
                role()

    def blank(self) -> None:
        """Rows of y that are no sequence's become zero."""
        buffer = self.refs.y_s[2].at[0]
        buffer[...] = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), buffer.dtype), LAYOUT)
        plgpu.commit_smem()

        def step(c: jax.Array, _: None) -> None:
            # They reach to the array's end, behind which TMA drops what it is given.
            rows = self.refs.y.at[self.piece.b, pl.ds(self.token(c), ROWS), self.h, self.channels]
            plgpu.copy_smem_to_gmem(buffer, rows)

        lax.fori_loop(jnp.int32(0), self.count, step, None)
        plgpu.wait_smem_to_gmem(0)

    # Products within a chunk.

    def score(self, turn: int) -> None:
        refs, shape = self.refs, self.shape
        # A token reaches those after it: nothing is left of the others' decay, however large.
        reach = jnp.where(indices(1) >= indices(0), jnp.inf, -jnp.inf)

        def step(i: jax.Array, _: None) -> None:
            c = i * shape.scores + turn
            slot, buffer = rem(c, shape.stages), rem(c, _BUFFERS)
            plgpu.barrier_wait(refs.full.at[slot])
            if self.may_end_short:
                pl.when(self.left(c) < CHUNK)(lambda: self.clear(c))

            def product(CB: Any) -> jax.Array:
                for k in range(shape.widths):
                    plgpu.wgmma(CB, refs.B_s[1].at[slot, k], refs.C_s[1].at[slot, k].transpose((1, 0)))
                a = load(refs.v_s.at[slot, A], layout=ACROSS)
                b = load(refs.v_s.at[slot, B], layout=DOWN)
                return CB[...] * jnp.exp2(jnp.minimum(across(a, ROWS) - down(b, COLUMNS), reach))

            M = pl.run_scoped(product, ACC((ROWS, COLUMNS), jnp.float32))
            pl.when(c >= _BUFFERS)(lambda: plgpu.barrier_wait(refs.free.at[buffer]))
            refs.m_s.at[buffer][...] = M.astype(refs.m_s.dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.ready.at[buffer])
            plgpu.barrier_arrive(refs.empty.at[slot])

        turns = lax.div(self.count - turn + shape.scores - 1, jnp.int32(shape.scores))
        lax.fori_loop(jnp.int32(0), turns, step, None)

    def clear(self, c: jax.Array) -> None:
        """Other sequences' rows of x and B, which the tensor cores would multiply by zero: they may be NaN."""
        slot, left = rem(c, self.shape.stages), self.left(c)
        clear(self.refs.x_s[1].at[slot], indices(0), left)
        for k in range(self.shape.widths):
            clear(self.refs.B_s[1].at[slot, k], indices(0), left)
        plgpu.commit_smem()

    # The state.

    def carry(self) -> None:
        S = lax.fori_loop(jnp.int32(0), self.count, partial(self.step, self.skip()), self.before())
        refs, piece = self.refs, self.piece
        if refs.final is not None:
            pl.when(piece.last)(lambda: self.put(refs.final.at[piece.n], S))

    def put(self, states: Any, S: tuple[jax.Array, ...]) -> None:
        for k, part in enumerate(S):
            states.at[self.h, self.channels, pl.ds(k * COLUMNS, COLUMNS)][...] = part.astype(states.dtype)

    def get(self, states: Any) -> tuple[jax.Array, ...]:
        return tuple(
            load(states.at[self.h, self.channels, pl.ds(k * COLUMNS, COLUMNS)], layout=LAYOUT).astype(jnp.float32)
            for k in range(self.shape.widths)
        )

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

        def add(k: jax.Array, S: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            slot = piece.slot - piece.k + k
            decay = jnp.exp2(refs.totals[slot, self.h])
            return tuple(s * decay + end for s, end in zip(S, self.get(refs.ends.at[slot]), strict=True))

        return lax.fori_loop(jnp.int32(0), piece.k, add, S)

    def skip(self) -> jax.Array | None:
        """D of this block's channels."""
        D = self.refs.D
        if D is None:
            return None
        if len(D.shape) == 1:
            return jnp.broadcast_to(D[self.h].astype(jnp.float32), (ROWS, COLUMNS))
        return down(load(D.at[self.h, self.channels], layout=DOWN).astype(jnp.float32), COLUMNS)

    def step(self, D: jax.Array | None, c: jax.Array, S: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """One chunk. What later products need is made while earlier ones run; nothing is in flight across the loop's edge."""
        refs, shape, dtype = self.refs, self.shape, jnp.dtype(self.static.dtype)
        slot, buffer = rem(c, shape.stages), rem(c, _BUFFERS)
        # Ready: M is there, and so all that it was made of, and x and B are clear.
        plgpu.barrier_wait(refs.ready.at[buffer])

        def inner() -> tuple[jax.Array, ...]:
            x = load(refs.x_s[1].at[slot].transpose((1, 0)), layout=LAYOUT)
            return x, *(load(refs.v_s.at[slot, row], layout=ACROSS) for row in (GROWN, WEIGHT))

        def products(y: Any, *ends: Any) -> tuple[jax.Array, ...]:
            # On their way while S is multiplied, where there are registers for them beside it.
            early = inner() if len(S) <= _PAIR else None
            decay = refs.v_s[slot, GROWN, CHUNK - 1]
            for k in range(0, len(S), _PAIR):
                if k:
                    plgpu.wgmma_wait(0)
                operands = [s.astype(dtype) for s in S[k : k + _PAIR]]
                for s, end in zip(S[k : k + _PAIR], ends[k : k + _PAIR], strict=True):
                    end[...] = s * decay
                for i, s in enumerate(operands):
                    plgpu.wgmma(y, s, refs.C_s[1].at[slot, k + i].transpose((1, 0)))
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
            plgpu.wgmma(y, x, refs.m_s.at[buffer])
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
        refs, slot, buffer = self.refs, rem(c, self.shape.stages), rem(c, _BUFFERS)
        pl.when(c + _BUFFERS < self.count)(lambda: plgpu.barrier_arrive(refs.free.at[buffer]))
        if refs.z_s is not None:
            y = y * silu(load(refs.z_s[1].at[slot].transpose((1, 0)), layout=LAYOUT).astype(jnp.float32))
        y = y.astype(refs.y_s[1].dtype)
        pl.when(c >= _BUFFERS)(lambda: plgpu.barrier_wait(refs.y_free.at[buffer]))

        def put(view: int) -> None:
            refs.y_s[view].at[buffer].transpose((1, 0))[...] = y

        if not self.dims.packed:
            put(1)
            return
        short = self.left(c) < CHUNK
        pl.when(jnp.logical_not(short))(lambda: put(1))
        pl.when(short)(lambda: put(2))

    def keep(self, c: jax.Array, S: tuple[jax.Array, ...]) -> None:
        """The state, where a chunk of the caller's ends."""
        piece, each = self.piece, self.dims.L // CHUNK
        chunk = piece.k * (self.shape.cut.tokens // CHUNK) + c
        ends = (rem(chunk + 1, each) == 0) | (piece.last & (c == self.count - 1))
        slot = piece.base + lax.div(chunk, jnp.int32(each))
        pl.when(ends)(lambda: self.put(self.refs.intermediate.at[piece.b, slot], S))
