"""The first kernel: all of a chunk that needs no state, for one or two value heads of a key head. One warpgroup a block.

    G = cumsum(g)    P = mask_{j<=i}(q_i·k_j·exp(G_i - G_j))    A = mask_{j<i}(beta_i·k_i·k_j·exp(G_i - G_j))
    w = (I + A)^-1 (beta·exp(G)·k)      u = (I + A)^-1 (beta·v)

What is rounded to q's dtype: q and k where they are normalised; P; the inverse; beta·exp(G)·k and beta·v as operands; w and u.
Shared memory and registers are few enough for two blocks an SM: one waits for its tiles or its rows while the other computes.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._branches import when
from .._numerics import exp
from ..ssd._fused_tiles import operand, rem
from ..ssd._tiles import ACC, ACROSS, COLUMNS, DOWN, LAYOUT, ROWS, across, down, indices, load, locate, tiles
from . import _fused_inverse as inverse
from ._fused_shape import CHUNK, GROWN, LEFT, Shape

_EPS = 1e-6
# Tiles of w or u that are kept in registers at a time.
_PAIR = 2


def run(shape: Shape, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`arrays`: q, k and v as the caller has them; g and beta in fp32, [NC,B,H_v,64] and zero where no token is; cu_seqlens."""
    dims, dtype = shape.static.dims, shape.dtype
    outputs = {
        "tiles": shape.tiles,
        "gates": jax.ShapeDtypeStruct((shape.chunks * dims.H_v, 2, CHUNK), jnp.float32),
    }
    scratch = {
        "q_s": tiles(shape.widths, dtype=dtype),
        "k_s": tiles(shape.widths, dtype=dtype),
        "v_s": tiles(shape.parts, dtype=dtype),
        # P leaves before the merges.
        "P_s": plgpu.RefUnion(operand(dtype=dtype), inverse.terms_scratch()),
        "A_s": inverse.blocks_scratch(),
        "g_s": plgpu.SMEM((shape.heads, CHUNK), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=2 * shape.widths),
        "v_ready": plgpu.Barrier(num_arrivals=shape.parts),
    }

    def body(*refs: Any) -> None:
        given = dict(zip(arrays, refs, strict=False))
        out = dict(zip(outputs, refs[len(arrays) :], strict=False))
        own = dict(zip(scratch, refs[len(arrays) + len(outputs) :], strict=True))
        _Prepare(shape, given, out, own).run()

    results = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        grid=(shape.prepare_blocks,),
        grid_names=("block",),
        kernel_name="gdn_prepare",
        compiler_params=plgpu.CompilerParams(
            # Whoever reads what another thread has written waits for a barrier or commits first.
            unsafe_no_auto_barriers=True,
            approx_math=True,
            # Every array has the layout that it is loaded in: there is nothing to infer, which takes longer than to compile.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(*arrays.values())
    return dict(zip(outputs, results, strict=True))


class _Prepare:
    def __init__(self, shape: Shape, given: dict[str, Any], out: dict[str, Any], own: dict[str, Any]):
        self.shape, self.dims = shape, shape.static.dims
        self.given, self.out, self.own = SimpleNamespace(**given), SimpleNamespace(**out), SimpleNamespace(**own)
        dims: Any = self.dims  # of SSD's or these, `locate` looks at what both have
        block = lax.axis_index("block")
        groups = dims.H_v // shape.heads
        self.first, chunk = rem(block, groups) * shape.heads, lax.div(block, jnp.int32(groups))
        self.b, self.slot, self.chunk = lax.div(chunk, jnp.int32(dims.NC)), rem(chunk, dims.NC), chunk
        self.h_k = lax.div(self.first, jnp.int32(dims.H_v // dims.H_k))
        self.where = locate(dims, given.get("cu_seqlens"), self.b, self.slot)

    def run(self) -> None:
        when(self.where.length > 0)(self.prepare)

    def prepare(self) -> None:
        own, shape = self.own, self.shape
        heads = range(shape.heads)
        self.fetch(self.given.q, self.h_k, own.q_s, own.ready)
        self.fetch(self.given.k, self.h_k, own.k_s, own.ready)
        self.fetch(self.given.v, self.first, own.v_s, own.v_ready)
        betas = [load(self.given.beta.at[self.slot, self.b, self.first + r], layout=DOWN) for r in heads]
        gates = [self.cumulate(r) for r in heads]
        plgpu.commit_smem()
        plgpu.barrier_wait(own.ready)
        self.tidy(own.q_s[1])
        self.tidy(own.k_s[1])
        plgpu.commit_smem()
        when(rem(self.first, self.dims.H_v // self.dims.H_k) == 0)(self.keep)
        vectors = list(zip(betas, gates, strict=True))
        self.triangles(vectors)
        plgpu.commit_smem()
        inverse.substitute(own.A_s)
        plgpu.commit_smem()

        def finish(r: jax.Array, beta: jax.Array, G: jax.Array) -> None:
            X, A = inverse.get(own.A_s, r)
            # What has left makes room: q for rows of k, P for the terms of the merge, and the head before for the next.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            when(r > 0)(lambda: self.fetch(self.given.v, self.first + r, own.v_s, own.v_ready))
            self.multiply(r, inverse.merge(X, A, own.P_s[1], shape.dtype), beta, G)

        self.for_heads(finish, vectors)
        plgpu.wait_smem_to_gmem(0)

    def for_heads(self, do: Any, vectors: list[tuple[jax.Array, jax.Array]]) -> None:
        """`do(r, beta, G)`, as a loop: code twice as long takes twice as long to make ready."""

        def step(r: jax.Array, vectors: list[tuple[jax.Array, jax.Array]]) -> list[tuple[jax.Array, jax.Array]]:
            do(r, *vectors[0])
            return vectors[1:] + vectors[:1]

        lax.fori_loop(0, self.shape.heads, step, vectors)

    def fetch(self, source: Any, head: Any, target: Any, barrier: Any) -> None:
        for i in range(target[0].shape[0]):
            rows = source.at[self.b, pl.ds(self.where.begin, ROWS), head, pl.ds(i * COLUMNS, COLUMNS)]
            plgpu.copy_gmem_to_smem(rows, target[0].at[i], barrier)

    def cumulate(self, r: int) -> jax.Array:
        """G of a head, down the rows; across the columns it goes through shared memory. To the second kernel: its exp."""
        head = self.first + r
        g = across(load(self.given.g.at[self.slot, self.b, head], layout=ACROSS), ROWS)
        G, last = jnp.sum(jnp.where(indices(0) >= indices(1), g, 0.0), axis=1), jnp.sum(g, axis=1)
        self.own.g_s.at[r][...] = G
        gates = self.out.gates.at[self.chunk * self.dims.H_v + head]
        gates.at[GROWN][...] = exp(G)
        gates.at[LEFT][...] = exp(last - G)
        return G

    def real(self, tile: jax.Array) -> jax.Array:
        """Other sequences' rows become zero, by a select: they may be NaN. (Behind the arrays' own end TMA has put zeros.)"""
        if not self.dims.packed:
            return tile
        return jnp.where(indices(0) < self.where.length, tile, jnp.zeros_like(tile))

    def tidy(self, tiles: Any) -> None:
        """q or k as all that follows wants it."""
        if not self.dims.packed and not self.shape.static.use_qk_l2norm:
            return
        rows = [self.real(load(tiles.at[i], layout=LAYOUT)) for i in range(self.shape.widths)]
        if self.shape.static.use_qk_l2norm:
            wide = [row.astype(jnp.float32) for row in rows]
            squares = sum(jnp.sum(row * row, axis=1) for row in wide)
            factor = down(lax.rsqrt(squares + _EPS), COLUMNS)
            rows = [(row * factor).astype(self.shape.dtype) for row in wide]
        for i, row in enumerate(rows):
            tiles.at[i][...] = row

    def keep(self) -> None:
        """q and k for the second kernel."""
        first = (self.chunk * self.dims.H_k + self.h_k) * self.shape.widths
        for name, source in (("q", self.own.q_s), ("k", self.own.k_s)):
            at = self.shape.first(name) + first
            plgpu.copy_smem_to_gmem(source[1], self.out.tiles.at[pl.ds(at, self.shape.widths)])

    def triangles(self, vectors: list[tuple[jax.Array, jax.Array]]) -> None:
        """P to where it belongs, A to shared memory."""
        own, shape = self.own, self.shape

        def products(qk: Any, kk: Any) -> tuple[jax.Array, jax.Array]:
            for i in range(shape.widths):
                plgpu.wgmma(qk, own.q_s[1].at[i], own.k_s[1].at[i].transpose((1, 0)))
                plgpu.wgmma(kk, own.k_s[1].at[i], own.k_s[1].at[i].transpose((1, 0)))
            return qk[...], kk[...]

        tile = ACC((ROWS, ROWS), jnp.float32)
        qk, kk = pl.run_scoped(products, tile, tile)
        i, j = indices(0), indices(1)

        def one(r: jax.Array, beta: jax.Array, G: jax.Array) -> None:
            # Masked before the exp: gates may be of either sign.
            difference = jnp.where(i >= j, down(G, ROWS) - across(load(own.g_s.at[r], layout=ACROSS), ROWS), 0.0)
            decay = exp(difference)

            @when(r > 0)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()

            # Apart, for LLVM would round number by number and select then.
            P = lax.optimization_barrier(jnp.where(i >= j, qk * decay, 0.0))
            own.P_s[0][...] = P.astype(shape.dtype)
            plgpu.commit_smem()
            at = shape.first("P") + self.chunk * self.dims.H_v + self.first + r
            plgpu.copy_smem_to_gmem(own.P_s[0], self.out.tiles.at[at])
            A = lax.optimization_barrier(jnp.where(i > j, kk * down(beta, ROWS) * decay, 0.0))
            # Without a second head the first is inverted twice.
            for copy in range(0, 2, shape.heads):
                inverse.put(own.A_s, r + copy, A)

        self.for_heads(one, vectors)

    def multiply(self, r: jax.Array, X: jax.Array, beta: jax.Array, G: jax.Array) -> None:
        """w and u of one head. The operands and then the results lie where q and v were."""
        own, shape, dtype = self.own, self.shape, self.shape.dtype
        index = self.chunk * self.dims.H_v + self.first + r

        def rows_of(source: Any, i: int, weight: jax.Array) -> jax.Array:
            wide = self.real(load(source[1].at[i], layout=LAYOUT)).astype(jnp.float32)
            return (wide * down(weight, COLUMNS)).astype(dtype)

        def product(operand: Any) -> jax.Array:
            def multiply(sums: Any) -> jax.Array:
                plgpu.wgmma(sums, X, operand)
                return sums[...]

            return pl.run_scoped(multiply, ACC((ROWS, COLUMNS), jnp.float32)).astype(dtype)

        for name, source, target, count, weight in (
            ("w", own.k_s, own.q_s, shape.widths, beta * exp(G)),
            ("u", own.v_s, own.v_s, shape.parts, beta),
        ):
            if source is own.v_s:
                plgpu.barrier_wait(own.v_ready)
            for i in range(count):
                target[1].at[i][...] = rows_of(source, i, weight)
            plgpu.commit_smem()
            for i in range(0, count, _PAIR):
                pair = range(i, min(i + _PAIR, count))
                results = [product(target[1].at[i]) for i in pair]
                # Every warp reads all of an operand: none may be written before the last has.
                plgpu.commit_smem()
                for i, result in zip(pair, results, strict=True):
                    target[1].at[i][...] = result
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(target[1], self.out.tiles.at[pl.ds(shape.first(name) + index * count, count)])
