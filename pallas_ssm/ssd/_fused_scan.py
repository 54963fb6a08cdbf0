"""The fused kernel: y and states of 64 channels in one piece, chunk after chunk, in shared memory and registers.

Warpgroups by what they do, tied by barriers and never to the block as a whole:

    carry    S [64 channels, N] in fp32 registers. y^T = exp(a)·(S C^T) + D·x^T + x^T M^T, S = exp(a_last)·S + (x·w)^T B;
             a warpgroup for each head (`_fused_carry`)
    score    M^T = B C^T ∘ decay·dt, masked: B C^T once for all heads; one warpgroup, or two in turns
    feed     tiles by TMA, vectors from dt, y out (`_fused_block`)

Transposed, S and x are the left operands, which wgmma takes from registers: the state never passes through shared memory, whose
bandwidth is what the kernel has least of. Two heads of a group halve what B, C and B C^T take of it. What is rounded to x's
dtype: S, M and x·w as operands; y.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._branches import either, when
from .._by_lane import BY_LANE
from ._fused_block import DT_HEADS, A, B, Block, Shape
from ._fused_carry import BUFFERS, Carry
from ._fused_pieces import CHUNK
from ._fused_tiles import clear, operand, rem
from ._tiles import ACC, ACROSS, COLUMNS, DOWN, LAYOUT, ROWS, across, down, indices, load, tiles


def run(shape: Shape, arrays: dict[str, jax.Array], outputs: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """`arrays`: of Floats and Integers, and `ends` and `totals` where a sequence may have several pieces."""
    dtype = jnp.dtype(shape.static.dtype)
    stages, heads, widths = shape.stages, shape.heads, shape.widths
    scratch = {
        "x_s": tiles(stages, heads, dtype=dtype),
        "B_s": tiles(stages, widths, dtype=dtype),
        "C_s": tiles(stages, widths, dtype=dtype),
        **({"z_s": tiles(stages, heads, dtype=dtype)} if "z" in arrays else {}),
        "v_s": plgpu.SMEM((stages, heads, 4, CHUNK), jnp.float32),
        "m_s": operand(BUFFERS, heads, dtype=dtype),
        "y_s": tiles(BUFFERS, heads, dtype=dtype, linear=True),
        "dt_s": plgpu.SMEM((2, shape.dt_chunks * CHUNK, DT_HEADS), arrays["dt"].dtype),
        "da_s": plgpu.SMEM((2, heads, CHUNK), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=1 + heads * (1 + ("z" in arrays)) + 2 * widths, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=1 + heads, num_barriers=stages),
        "ready": plgpu.Barrier(num_barriers=BUFFERS),
        "free": plgpu.Barrier(num_arrivals=heads, num_barriers=BUFFERS),
        "y_free": plgpu.Barrier(num_barriers=BUFFERS),
        "dt_full": plgpu.Barrier(num_barriers=2),
    }
    names = (*arrays, *outputs, *scratch)

    def body(*refs: Any) -> None:
        named = dict.fromkeys(("D", "z", "dt_bias", "initial_states", "cu_seqlens", "final", "intermediate", "z_s"))
        _Scan(shape, named | dict(zip(names, refs, strict=True))).run()

    results = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        grid=(shape.blocks(),),
        grid_names=("block",),
        num_threads=heads + shape.scores + 1,
        thread_name="warpgroup",
        kernel_name="mamba_chunk_scan_combined",
        compiler_params=BY_LANE,
    )(*arrays.values())
    return dict(zip(outputs, results, strict=True))


def registers(shape: Shape) -> tuple[int, int, int]:
    """Of a thread of each role. All warpgroups' together are no more than a block gets, or it would wait for them forever."""
    if shape.heads > 1:
        return (184, 80, 64)
    return (240, 136, 128) if shape.scores == 1 else (192, 112, 96)


class _Scan(Block):
    def run(self) -> None:
        here, warpgroup = self.piece.length >= 0, lax.axis_index("warpgroup")
        carry, score, feed = registers(self.shape)
        roles = [(1, score, lambda _, turn=turn: self.score(turn)) for turn in range(self.shape.scores)]
        roles = [
            (self.shape.heads, carry, lambda i: Carry(self, i).run()),
            *roles,
            (1, feed, lambda _: self.feed(triangle=self.shape.heads == 1)),
        ]
        if not self.dims.packed:
            when(here)(lambda: self.share_out(roles))
            return
        real = self.piece.n < self.dims.N_seq
        either(here & real, lambda: self.share_out(roles), lambda: when(here & (warpgroup == 0))(self.blank))

    def blank(self) -> None:
        """Rows of y that are no sequence's become zero."""
        buffer = self.refs.y_s[2].at[0, 0]
        buffer[...] = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), buffer.dtype), LAYOUT)
        plgpu.commit_smem()

        def step(c: jax.Array, _: None) -> None:
            # They reach to the array's end, behind which TMA drops what it is given.
            for h in self.heads:
                rows = self.refs.y.at[self.piece.b, pl.ds(self.token(c), ROWS), h, self.channels]
                plgpu.copy_smem_to_gmem(buffer, rows)

        lax.fori_loop(jnp.int32(0), self.count, step, None)
        plgpu.wait_smem_to_gmem(0)

    # Products within a chunk.

    def score(self, turn: int) -> None:
        refs, shape = self.refs, self.shape
        reach = self.reach(refs.m_s.at[turn, 0])

        def step(i: jax.Array, _: None) -> None:
            c = i * shape.scores + turn
            slot, buffer = rem(c, shape.stages), rem(c, BUFFERS)
            plgpu.barrier_wait(refs.full.at[slot])
            if self.may_end_short:
                when(self.left(c) < CHUNK)(lambda: self.clear(c))

            def product(CB: Any) -> jax.Array:
                for k in range(shape.widths):
                    plgpu.wgmma(CB, refs.B_s[1].at[slot, k], refs.C_s[1].at[slot, k].transpose((1, 0)))
                return CB[...]

            CB = pl.run_scoped(product, ACC((ROWS, COLUMNS), jnp.float32))
            M = [self.decayed(CB, reach, refs.v_s.at[slot, head]) for head in range(shape.heads)]
            when(c >= BUFFERS)(lambda: plgpu.barrier_wait(refs.free.at[buffer]))
            for head in range(shape.heads):
                refs.m_s.at[buffer, head][...] = M[head]
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.ready.at[buffer])
            plgpu.barrier_arrive(refs.empty.at[slot])

        turns = lax.div(self.count - turn + shape.scores - 1, jnp.int32(shape.scores))
        lax.fori_loop(jnp.int32(0), turns, step, None)

    def reach(self, tile: Any) -> jax.Array:
        """All bits where a token reaches another, which comes after it, none elsewhere.

        To mask rounded pairs takes half the registers and instructions that a bound of the exponent takes, and whatever the
        others' decay is, nothing of it is left. Read back from memory, or the compiler selects number by number instead.
        """
        bits = jnp.where(indices(1) >= indices(0), -1, 0).astype(jnp.int16)
        tile[...] = lax.bitcast_convert_type(bits, tile.dtype)
        plgpu.commit_smem()
        return lax.bitcast_convert_type(load(tile, layout=LAYOUT), jnp.int16)

    def decayed(self, CB: jax.Array, reach: jax.Array, v_s: Any) -> jax.Array:
        """One head's M^T."""
        a, b = load(v_s.at[A], layout=ACROSS), load(v_s.at[B], layout=DOWN)
        M = (CB * jnp.exp2(across(a, ROWS) - down(b, COLUMNS))).astype(self.refs.m_s.dtype)
        return lax.bitcast_convert_type(lax.bitcast_convert_type(M, jnp.int16) & reach, M.dtype)

    def clear(self, c: jax.Array) -> None:
        """Other sequences' rows of x and B, which the tensor cores would multiply by zero: they may be NaN."""
        slot, left = rem(c, self.shape.stages), self.left(c)
        for i in range(self.shape.heads):
            clear(self.refs.x_s[1].at[slot, i], indices(0), left)
        for k in range(self.shape.widths):
            clear(self.refs.B_s[1].at[slot, k], indices(0), left)
        plgpu.commit_smem()
