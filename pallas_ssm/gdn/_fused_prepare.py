"""The first kernel: all of a chunk that needs no state, for one or two value heads of a key head. One warpgroup a block.

    G = cumsum(g)    x, y: 1/|q|, 1/|k| with use_qk_l2norm, else 1
    A = mask_{j<i}(beta_i·y_i·y_j·k_i·k_j·exp(G_i - G_j))              X = (I + A)^-1·diag(beta)
    P = mask_{j<=i}(scale·x_i·y_j·q_i·k_j·exp(G_i - G_j))              PX = P·X
    d = y·exp(G_last - G)                                              Y = (diag(d)·X)^T·k
    a = scale·x·exp(G)    b = y·exp(G)    c = exp(G_last)

With r = v - b·(k·h), h the state before the chunk, X·r is what the delta rule writes for each token; so o = a·(q·h) + PX·r and
the state after the chunk is c·h + Y^T·r. Neither v nor a product with it is needed here.

What is rounded to q's dtype: P, X, diag(d)·X, PX and Y. Norms are factors in fp32.
Shared memory and registers are few enough for two blocks an SM: one waits while the other computes.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._branches import when
from .._by_lane import BY_LANE
from .._numerics import LOG2E
from ..ssd._fused_tiles import operand, rem
from ..ssd._tiles import (
    ACC,
    ACROSS,
    COLUMNS,
    DOWN,
    LAYOUT,
    ROWS,
    across,
    clear_rows,
    down,
    indices,
    load,
    locate,
    tiles,
)
from . import _fused_inverse as inverse
from ._fused_shape import CHUNK, KEY, LEFT, QUERY, Shape

_EPS = 1e-6
# Tiles for a merge's operands; then X, PX and diag(d)·X.
_TILES = 3


def run(shape: Shape, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`arrays`: q and k as the caller has them; g and beta in fp32, [NC,B,H_v,64] and zero where no token is; cu_seqlens."""
    dims, dtype = shape.static.dims, shape.dtype
    outputs = {
        "tiles": shape.tiles,
        "weights": jax.ShapeDtypeStruct((shape.chunks * dims.H_v, 3, CHUNK), jnp.float32),
    }
    scratch = {
        # q, and then Y.
        "q_s": tiles(shape.widths, dtype=dtype),
        "k_s": tiles(shape.widths, dtype=dtype),
        "P_s": operand(shape.heads, dtype=dtype),
        "A_s": inverse.blocks_scratch(),
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
        grid=(shape.pieces,),
        grid_names=("piece",),
        kernel_name="gdn_prepare",
        compiler_params=BY_LANE,
    )(*arrays.values())
    return dict(zip(outputs, results, strict=True))


class _Prepare:
    def __init__(self, shape: Shape, given: dict[str, Any], out: dict[str, Any], own: dict[str, Any]):
        self.shape, self.dims = shape, shape.static.dims
        self.given, self.out, self.own = SimpleNamespace(**given), SimpleNamespace(**out), SimpleNamespace(**own)
        dims: Any = self.dims  # of SSD's or these, `locate` looks at what both have
        piece, groups = lax.axis_index("piece"), dims.H_v // shape.heads
        self.first, self.chunk = rem(piece, groups) * shape.heads, lax.div(piece, jnp.int32(groups))
        self.b, self.slot = lax.div(self.chunk, jnp.int32(dims.NC)), rem(self.chunk, dims.NC)
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
        qk, kk, norm = self.products()
        heads = [(beta, G, self.weigh(r, *norm, G, last)) for r, (beta, G, last) in enumerate(gates)]
        below = plgpu.layout_cast(jnp.zeros((ROWS, inverse.HALF), jnp.float32), LAYOUT)
        heads = self.for_heads(
            lambda r, beta, G, d, _: (beta, G, d, self.triangles(r, qk, kk, beta, G)),
            [(*head, below) for head in heads],
        )
        plgpu.commit_smem()
        inverse.substitute(own.A_s)
        plgpu.commit_smem()
        self.for_heads(self.finish, heads)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def for_heads(self, do: Any, heads: list[tuple[jax.Array, ...]]) -> list[tuple[jax.Array, ...]]:
        """[do(r, *heads[r])], as a loop: code twice as long takes twice as long to make ready."""

        def step(r: jax.Array, heads: list[tuple[jax.Array, ...]]) -> list[tuple[jax.Array, ...]]:
            return [*heads[1:], do(r, *heads[0])]

        return lax.fori_loop(0, self.shape.heads, step, heads)

    def fetch(self, source: Any, target: Any) -> None:
        for i in range(self.shape.widths):
            rows = source.at[self.b, pl.ds(self.where.begin, ROWS), self.h_k, pl.ds(i * COLUMNS, COLUMNS)]
            plgpu.copy_gmem_to_smem(rows, target[0].at[i], self.own.ready)

    def cumulate(self, r: int) -> tuple[jax.Array, ...]:
        """(beta, G, G_last) of a head, down the rows, G in powers of two; beta and G also go to shared memory."""
        head = self.first + r
        beta = load(self.given.beta.at[self.slot, self.b, head], layout=DOWN)
        g = across(load(self.given.g.at[self.slot, self.b, head], layout=ACROSS) * LOG2E, ROWS)
        G, last = jnp.sum(jnp.where(indices(0) >= indices(1), g, 0.0), axis=1), jnp.sum(g, axis=1)
        self.own.g_s.at[r][...] = G
        self.own.beta_s.at[r][...] = beta
        return beta, G, last

    def products(self) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
        """q·k^T and k·k^T of rows of norm one, where they are to be, q's with the scale; and the rows' factors for that."""
        own, shape, norms = self.own, self.shape, self.shape.static.use_qk_l2norm

        def multiply(qk: Any, kk: Any, *qq: Any) -> list[jax.Array]:
            for i in range(shape.widths):
                q, k = own.q_s[1].at[i], own.k_s[1].at[i]
                plgpu.wgmma(qk, q, k.transpose((1, 0)))
                plgpu.wgmma(kk, k, k.transpose((1, 0)))
                for squares in qq:
                    plgpu.wgmma(squares, q, q.transpose((1, 0)))
            return [sums[...] for sums in (qk, kk, *qq)]

        tile = ACC((ROWS, ROWS), jnp.float32)
        qk, kk, *qq = pl.run_scoped(multiply, tile, tile, *[tile] * norms)
        if not norms:
            one = plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), DOWN)
            plgpu.commit_smem()
            return qk * shape.static.scale, kk, (one * shape.static.scale, one)
        q_norm, k_norm = _norm(qq[0]) * shape.static.scale, _norm(kk)
        own.norm_s[...] = k_norm
        plgpu.commit_smem()
        keys = across(load(own.norm_s, layout=ACROSS), ROWS)
        return qk * down(q_norm, ROWS) * keys, kk * down(k_norm, ROWS) * keys, (q_norm, k_norm)

    def weigh(self, r: int, q_norm: jax.Array, k_norm: jax.Array, G: jax.Array, last: jax.Array) -> jax.Array:
        """a, b and c of a head to the second kernel; returns d."""
        weights = self.out.weights.at[self.chunk * self.dims.H_v + self.first + r]
        grown = jnp.exp2(G)
        weights.at[QUERY][...] = q_norm * grown
        weights.at[KEY][...] = k_norm * grown
        weights.at[LEFT][...] = jnp.exp2(last)
        return k_norm * jnp.exp2(last - G)

    def triangles(self, r: jax.Array, qk: jax.Array, kk: jax.Array, beta: jax.Array, G: jax.Array) -> jax.Array:
        """P and A of a head to shared memory; what `inverse.put` leaves in registers."""
        own, i, j = self.own, indices(0), indices(1)
        # Masked before the exponential: gates may be of either sign.
        G_across = across(load(own.g_s.at[r], layout=ACROSS), ROWS)
        decay = jnp.exp2(jnp.where(i >= j, down(G, ROWS) - G_across, -jnp.inf))
        own.P_s.at[r][...] = (qk * decay).astype(self.shape.dtype)
        # What it has on its diagonal nobody looks at.
        A = kk * down(beta, ROWS) * decay
        # Without a second head the first is inverted twice.
        if self.shape.heads == 1:
            inverse.put(own.A_s, 1, A)
        return inverse.put(own.A_s, r, A)

    def finish(self, r: jax.Array, *head: jax.Array) -> tuple[jax.Array, ...]:
        """PX and Y of a head to where they belong."""
        own, shape = self.own, self.shape
        *_, d, A = head
        # The head before has left.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        X = inverse.merge(inverse.get(own.A_s, r), A, own.X_s[0])
        X = X * across(load(own.beta_s.at[r], layout=ACROSS), ROWS)
        plain, product, weighted = (own.X_s[1].at[i] for i in range(_TILES))
        plain[...] = X.astype(shape.dtype)
        weighted[...] = (X * down(d, ROWS)).astype(shape.dtype)
        plgpu.commit_smem()

        def multiply(sums: Any, left: Any, right: Any) -> jax.Array:
            plgpu.wgmma(sums, left, right)
            return sums[...].astype(shape.dtype)

        tile = ACC((ROWS, COLUMNS), jnp.float32)
        # Every warp reads all of an operand; but of these places nobody does any more.
        product[...] = pl.run_scoped(partial(multiply, left=own.P_s.at[r], right=plain), tile)
        for i in range(shape.widths):
            left, right = weighted.transpose((1, 0)), own.k_s[1].at[i]
            own.q_s[1].at[i][...] = pl.run_scoped(partial(multiply, left=left, right=right), tile)
        plgpu.commit_smem()
        index = self.chunk * self.dims.H_v + self.first + r
        plgpu.copy_smem_to_gmem(product, self.out.tiles.at[shape.first("PX") + index])
        at = pl.ds(shape.first("Y") + index * shape.widths, shape.widths)
        plgpu.copy_smem_to_gmem(own.q_s[1], self.out.tiles.at[at])
        return head


def _norm(squares: jax.Array) -> jax.Array:
    """Of the rows whose products with each other these are, its reciprocal."""
    return lax.rsqrt(jnp.sum(jnp.where(indices(0) == indices(1), squares, 0.0), axis=1) + _EPS)
