"""The first kernel: all of a chunk that needs no state, for one or two value heads of a key head. One warpgroup a block.

    G = cumsum(g)    x, y: 1/|q|, 1/|k| with use_qk_l2norm, else 1
    A = mask_{j<i}(beta_i·y_i·y_j·k_i·k_j·exp(G_i - G_j))              X = (I + A)^-1·diag(beta)
    P = mask_{j<=i}(scale·x_i·y_j·q_i·k_j·exp(G_i - G_j))              M = P·X
    d = y·exp(G_last - G)                                              Y = (diag(d)·X)^T·k
    a = scale·x·exp(G)    b = y·exp(G)    c = exp(G_last)

With r = v - b·(k·h), h the state before the chunk, X·r is what the delta rule writes for each token; so o = a·(q·h) + M·r and
the state after the chunk is c·h + Y^T·r. Neither v nor a product with it is needed here.

What is rounded to q's dtype: P, X, diag(d)·X, M and Y. Norms are factors in fp32.
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
from ..ssd._tiles import ACC, ACROSS, COLUMNS, DOWN, LAYOUT, ROWS, across, clear_rows, down, indices, load, locate, tiles
from . import _fused_inverse as inverse
from ._fused_shape import CHUNK, KEY, LEFT, QUERY, Shape

_EPS = 1e-6
# X and diag(d)·X, and as many of Y at most.
_TILES = 2


def run(shape: Shape, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`arrays`: q and k as the caller has them; g and beta in fp32, [NC,B,H_v,64] and zero where no token is; cu_seqlens."""
    dims, dtype = shape.static.dims, shape.dtype
    outputs = {
        "tiles": shape.tiles,
        "weights": jax.ShapeDtypeStruct((shape.chunks * dims.H_v, 3, CHUNK), jnp.float32),
    }
    scratch = {
        # q; then the heads' P; then M in their place.
        "q_s": tiles(max(shape.widths, shape.heads), dtype=dtype),
        "k_s": tiles(shape.widths, dtype=dtype),
        "A_s": inverse.blocks_scratch(),
        # Of one head after the other: a merge's terms; then X and diag(d)·X; then Y.
        "X_s": plgpu.RefUnion(inverse.terms_scratch(), operand(_TILES, dtype=dtype)),
        "g_s": plgpu.SMEM((shape.heads, CHUNK), jnp.float32),
        "beta_s": plgpu.SMEM((shape.heads, CHUNK), jnp.float32),
        "norm_s": plgpu.SMEM((CHUNK,), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=2 * shape.widths),
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
        self.fetch(self.given.q, own.q_s)
        self.fetch(self.given.k, own.k_s)
        gates = [self.cumulate(r) for r in range(shape.heads)]
        plgpu.barrier_wait(own.ready)
        if self.dims.packed:
            for tile in (own.q_s, own.k_s):
                clear_rows(tile[1], self.where.length)
        plgpu.commit_smem()
        qk, kk, norm = self.products()
        # Every warp has read all of q.
        plgpu.commit_smem()
        heads = [(beta, G, self.weigh(r, *norm, G, last)) for r, (beta, G, last) in enumerate(gates)]
        self.for_heads(lambda r, beta, G, _: self.triangles(r, qk, kk, beta, G), heads)
        plgpu.commit_smem()
        inverse.substitute(own.A_s)
        plgpu.commit_smem()
        self.for_heads(self.finish, heads)
        plgpu.wait_smem_to_gmem(0)

    def for_heads(self, do: Any, vectors: list[tuple[jax.Array, ...]]) -> None:
        """`do(r, beta, G, d)`, as a loop: code twice as long takes twice as long to make ready."""

        def step(r: jax.Array, vectors: list[tuple[jax.Array, ...]]) -> list[tuple[jax.Array, ...]]:
            do(r, *vectors[0])
            return vectors[1:] + vectors[:1]

        lax.fori_loop(0, self.shape.heads, step, vectors)

    def fetch(self, source: Any, target: Any) -> None:
        for i in range(self.shape.widths):
            rows = source.at[self.b, pl.ds(self.where.begin, ROWS), self.h_k, pl.ds(i * COLUMNS, COLUMNS)]
            plgpu.copy_gmem_to_smem(rows, target[0].at[i], self.own.ready)

    def cumulate(self, r: int) -> tuple[jax.Array, ...]:
        """(beta, G, G_last) of a head, down the rows; beta and G across the columns go through shared memory."""
        head = self.first + r
        beta = load(self.given.beta.at[self.slot, self.b, head], layout=DOWN)
        g = across(load(self.given.g.at[self.slot, self.b, head], layout=ACROSS), ROWS)
        G, last = jnp.sum(jnp.where(indices(0) >= indices(1), g, 0.0), axis=1), jnp.sum(g, axis=1)
        self.own.g_s.at[r][...] = G
        self.own.beta_s.at[r][...] = beta
        return beta, G, last

    def products(self) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
        """q·k^T and k·k^T of rows of length 1 (as far as they are to be), q's with the scale; and by what q and k are short."""
        own, shape = self.own, self.shape

        def multiply(qk: Any, kk: Any) -> tuple[jax.Array, ...]:
            for i in range(shape.widths):
                plgpu.wgmma(qk, own.q_s[1].at[i], own.k_s[1].at[i].transpose((1, 0)))
                plgpu.wgmma(kk, own.k_s[1].at[i], own.k_s[1].at[i].transpose((1, 0)))
            # Under the products.
            norm = self.norm(own.q_s[1]) * shape.static.scale, self.norm(own.k_s[1])
            own.norm_s[...] = norm[1]
            plgpu.commit_smem()
            return qk[...], kk[...], *norm

        tile = ACC((ROWS, ROWS), jnp.float32)
        qk, kk, q_norm, k_norm = pl.run_scoped(multiply, tile, tile)
        keys = across(load(own.norm_s, layout=ACROSS), ROWS)
        return qk * down(q_norm, ROWS) * keys, kk * down(k_norm, ROWS) * keys, (q_norm, k_norm)

    def norm(self, tiles: Any) -> jax.Array:
        """Of the rows of q or k, its reciprocal; or one."""
        if not self.shape.static.use_qk_l2norm:
            return plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), DOWN)
        squares = [load(tiles.at[i], layout=LAYOUT).astype(jnp.float32) ** 2 for i in range(self.shape.widths)]
        return lax.rsqrt(sum(jnp.sum(square, axis=1) for square in squares) + _EPS)

    def weigh(self, r: int, q_norm: jax.Array, k_norm: jax.Array, G: jax.Array, last: jax.Array) -> jax.Array:
        """a, b and c of a head to the second kernel; returns d."""
        weights = self.out.weights.at[self.chunk * self.dims.H_v + self.first + r]
        grown = exp(G)
        weights.at[QUERY][...] = q_norm * grown
        weights.at[KEY][...] = k_norm * grown
        weights.at[LEFT][...] = exp(last)
        return k_norm * exp(last - G)

    def triangles(self, r: jax.Array, qk: jax.Array, kk: jax.Array, beta: jax.Array, G: jax.Array) -> None:
        """P and A of a head to shared memory."""
        own, i, j = self.own, indices(0), indices(1)
        # Masked before the exp: gates may be of either sign.
        decay = exp(jnp.where(i >= j, down(G, ROWS) - across(load(own.g_s.at[r], layout=ACROSS), ROWS), 0.0))
        # Apart, for LLVM would round number by number and select then.
        P, A = lax.optimization_barrier(
            (jnp.where(i >= j, qk * decay, 0.0), jnp.where(i > j, kk * down(beta, ROWS) * decay, 0.0))
        )
        own.q_s[1].at[r][...] = P.astype(self.shape.dtype)
        # Without a second head the first is inverted twice.
        for copy in range(0, 2, self.shape.heads):
            inverse.put(own.A_s, r + copy, A)

    def finish(self, r: jax.Array, beta: jax.Array, G: jax.Array, d: jax.Array) -> None:
        """M and Y of a head to where they belong."""
        own, shape = self.own, self.shape
        X, A = inverse.get(own.A_s, r)
        # What has left makes room for the terms.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        X = inverse.merge(X, A, own.X_s[0]) * across(load(own.beta_s.at[r], layout=ACROSS), ROWS)
        plain, weighted = own.X_s[1].at[0], own.X_s[1].at[1]
        plain[...] = X.astype(shape.dtype)
        weighted[...] = (X * down(d, ROWS)).astype(shape.dtype)
        plgpu.commit_smem()

        def multiply(M: Any, *Y: Any) -> list[jax.Array]:
            plgpu.wgmma(M, own.q_s[1].at[r], plain)
            for i, y in enumerate(Y):
                plgpu.wgmma(y, weighted.transpose((1, 0)), own.k_s[1].at[i])
            return [sums[...].astype(shape.dtype) for sums in (M, *Y)]

        tile = ACC((ROWS, COLUMNS), jnp.float32)
        M, *Y = pl.run_scoped(multiply, tile, *[tile] * shape.widths)
        # Every warp reads all of an operand: none may be written before the last has.
        plgpu.commit_smem()
        own.q_s[1].at[r][...] = M
        for i, y in enumerate(Y):
            own.X_s[1].at[i][...] = y
        plgpu.commit_smem()
        index = self.chunk * self.dims.H_v + self.first + r
        plgpu.copy_smem_to_gmem(own.q_s[1].at[r], self.out.tiles.at[shape.first("M") + index])
        at = pl.ds(shape.first("Y") + index * shape.widths, shape.widths)
        plgpu.copy_smem_to_gmem(own.X_s[1].at[pl.ds(0, shape.widths)], self.out.tiles.at[at])
