"""(I + A)^-1 of the strictly lower triangles of two value heads, in fp32: substitution in blocks of 32, and one merge.

    (I + [A11  0 ])^-1 = [  X1            0 ]        X1 = (I + A11)^-1, X2 = (I + A22)^-1
         [A21 A22]       [-X2·A21·X1     X2 ]

Substitution, and no product of powers of A, for the reasons that `_xla_inverse` gives. The four blocks on the diagonals (two
of each head) are inverted at once, a warp each: a thread has one column of the inverse in registers and goes down its rows,
which waits for nobody. The merge is two products on tensor cores of operands split into two bf16 terms: what is lost of a
factor is 2^-17 of it, and the inverse will be rounded to 2^-9 or 2^-12.

The inverses of a head's two blocks are "folded" to [64,32]: row i holds the columns of its own block.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..ssd._tiles import ACC, LAYOUT, ROWS, indices, load

HALF = 32
# [block, row, column]: a warp each, in registers, a thread each.
_PIECE = 8
_COLUMN = plgpu.Layout.TILED(plgpu.Tiling(((4, 1, HALF), (1,))), warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)
_ALONG, _ONE_ROW = _COLUMN.reduce(2), _COLUMN.reduce(1)
_TERMS = 2


def blocks_scratch() -> Any:
    """Shared memory of what `substitute` inverts: of two heads' triangles the blocks on their diagonals."""
    return plgpu.SMEM((4, HALF, HALF), jnp.float32)


def terms_scratch() -> Any:
    """Shared memory of the terms of a merge's two operands."""
    transforms = (plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(64))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM((2, _TERMS, ROWS, HALF), jnp.bfloat16, transforms=transforms)


def _of(blocks: Any, head: Any) -> Any:
    return blocks.at[pl.ds(2 * head, 2)].reshape(ROWS, HALF)


def put(blocks: Any, head: Any, triangle: jax.Array) -> jax.Array:
    """A head's triangle to `blocks_scratch`, folded; returns [64,32] of which the lower half is A21."""
    left, right = triangle[:, :HALF], triangle[:, HALF:]
    _of(blocks, head)[...] = jnp.where(indices(0, HALF) < HALF, left, right)
    return left


def get(blocks: Any, head: Any) -> jax.Array:
    """After the substitution: the inverses, folded."""
    return load(_of(blocks, head), layout=LAYOUT)


def _spread(value: jax.Array, axis: int, rows: int) -> jax.Array:
    """Along the columns (what has rows, `axis` 1) or along the rows (what has columns, 2)."""
    return plgpu.layout_cast(lax.broadcast_in_dim(value, (4, rows, HALF), [0, axis]), _COLUMN)


def substitute(blocks: Any) -> None:
    """In place. No thread reads what another warp's has written."""
    row = plgpu.broadcasted_iota(jnp.int32, (4, _PIECE, HALF), 1, layout=_COLUMN)
    column = plgpu.broadcasted_iota(jnp.int32, (4, HALF), 1, layout=_ONE_ROW)
    none = plgpu.layout_cast(jnp.zeros((4, _PIECE, HALF), jnp.float32), _COLUMN)

    def less(x: jax.Array, i: Any, first: Any, X: jax.Array) -> jax.Array:
        """Row i of the right side less what X, rows of the inverse from `first` on, takes from it."""
        rows = X.shape[1]
        a = load(blocks.at[:, i, pl.ds(first, rows)], layout=_ALONG)
        return x - jnp.sum(_spread(a, 1, rows) * X, axis=1)

    def piece(p: jax.Array, _: None) -> None:
        begin = p * _PIECE

        def before(r: jax.Array, right: list[jax.Array]) -> list[jax.Array]:
            first = r * _PIECE
            X = load(blocks.at[:, pl.ds(first, _PIECE), :], layout=_COLUMN)
            return [less(x, begin + i, first, X) for i, x in enumerate(right)]

        right = [jnp.where(column == begin + i, 1.0, 0.0) for i in range(_PIECE)]
        X = none
        for i, x in enumerate(lax.fori_loop(0, p, before, right)):
            # Of its own piece only the rows before it.
            x = less(x, begin + i, begin, X[:, :i]) if i else x
            X = jnp.where(row == i, _spread(x, 2, _PIECE), X)
        blocks.at[:, pl.ds(begin, _PIECE), :][...] = X

    # Loops, for all that is unrolled is code that takes long to make ready.
    lax.fori_loop(0, HALF // _PIECE, piece, None)


def _split(value: jax.Array) -> list[jax.Array]:
    """bf16 terms whose sum is nearly the fp32 value."""
    terms = []
    for _ in range(_TERMS):
        # Held together, for LLVM would round every number once more, by itself.
        terms.append(lax.optimization_barrier(value.astype(jnp.bfloat16)))
        value = value - terms[-1].astype(jnp.float32)
    return terms


def _put(terms: Any, values: list[jax.Array]) -> None:
    for i, value in enumerate(values):
        terms.at[i][...] = value
    plgpu.commit_smem()


def _product(left: list[jax.Array], right: Any, rows: Any) -> jax.Array:
    """Of split [64,32] and [32,32] (`rows` of the terms in shared memory)."""

    def multiply(sums: Any) -> jax.Array:
        # The smallest first.
        for order in reversed(range(_TERMS)):
            for i in range(order + 1):
                plgpu.wgmma(sums, left[i], right.at[order - i, rows])
        return sums[...]

    return pl.run_scoped(multiply, ACC((ROWS, HALF), jnp.float32))


def merge(X: jax.Array, A: jax.Array, terms: Any) -> jax.Array:
    """The inverse.

    `X`: the inverses of its blocks, folded; `A`: A21 in the lower half, in the upper half anything; `terms`: nobody reads them
    any more. When it is done somebody may still read the second half of `terms`, and nobody the first.
    """
    first = indices(0, HALF) < HALF
    split = _split(X)
    _put(terms.at[0], split)
    middle = _product(_split(A), terms.at[0], pl.ds(0, HALF))
    _put(terms.at[1], _split(middle))
    corner = _product(split, terms.at[1], pl.ds(HALF, HALF))
    zero = plgpu.layout_cast(jnp.zeros((ROWS, HALF), jnp.float32), LAYOUT)
    return jnp.concatenate([jnp.where(first, X, -corner), jnp.where(first, zero, X)], axis=1)
