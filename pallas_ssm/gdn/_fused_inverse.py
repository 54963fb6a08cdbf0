"""(I + A)^-1 of the strictly lower triangles of two value heads, in fp32: substitution in blocks of 32, and one merge.

    (I + [A11  0 ])^-1 = [  X1            0 ]        X1 = (I + A11)^-1, X2 = (I + A22)^-1
         [A21 A22]       [-X2·A21·X1     X2 ]

Substitution, and no product of powers of A, for the reasons that `_xla_inverse` gives. The four blocks on the diagonals (two
of each head) are inverted at once, a warp each: a thread has one column of the inverse in registers and goes down its rows,
which waits for nobody. The merge is two products on tensor cores of operands split into three bf16 terms, whose six largest
products together are fp32's.

On its way a head's [64,64] triangle with nothing right of its blocks is "folded" to [64,32]: row i holds the columns of its
own block.
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
_COLUMN = plgpu.Layout.TILED(plgpu.Tiling(((4, _PIECE, HALF), (1,))), warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)
_ALONG, _ONE_ROW = _COLUMN.reduce(2), _COLUMN.reduce(1)
_TERMS = 3


def scratch() -> Any:
    """Two heads' blocks; in their place, later, the terms of a folded operand."""
    transforms = (plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(64))  # pyright: ignore[reportAbstractUsage]
    return plgpu.RefUnion(
        plgpu.SMEM((4, HALF + ROWS, HALF), jnp.float32),
        plgpu.SMEM((_TERMS, ROWS, HALF), jnp.bfloat16, transforms=transforms),
    )


def fold(A: jax.Array) -> jax.Array:
    return jnp.where(indices(0, HALF) < HALF, A[:, :HALF], A[:, HALF:])


def _views(blocks: Any, head: int) -> tuple[Any, Any]:
    """[64,32] of which the first half of the rows belongs to the head's first block, and one of which the second does to its
    second: in `blocks` both lie in rows 32 to 63."""
    return blocks.at[2 * head, pl.ds(HALF, ROWS)], blocks.at[2 * head + 1, pl.ds(0, ROWS)]


def put(blocks: Any, head: int, triangle: jax.Array) -> None:
    """A head's folded triangle to the first view of `scratch`."""
    for view in _views(blocks, head):
        view[...] = triangle


def get(blocks: Any, head: int) -> jax.Array:
    first, second = (load(view, layout=LAYOUT) for view in _views(blocks, head))
    return jnp.where(indices(0, HALF) < HALF, first, second)


def _spread(value: jax.Array, axis: int) -> jax.Array:
    """Along the columns (what has rows, `axis` 1) or along the rows (what has columns, 2)."""
    return plgpu.layout_cast(lax.broadcast_in_dim(value, (4, _PIECE, HALF), [0, axis]), _COLUMN)


def substitute(blocks: Any) -> None:
    """In the first view of `scratch`, in place. No thread reads what another warp's has written."""
    row = plgpu.broadcasted_iota(jnp.int32, (4, _PIECE, HALF), 1, layout=_COLUMN)
    column = plgpu.broadcasted_iota(jnp.int32, (4, HALF), 1, layout=_ONE_ROW)
    X = [plgpu.layout_cast(jnp.zeros((4, _PIECE, HALF), jnp.float32), _COLUMN) for _ in range(HALF // _PIECE)]
    for i in range(HALF):
        x = jnp.where(column == i, 1.0, 0.0)
        for piece in range(-(-i // _PIECE)):
            a = load(blocks.at[:, HALF + i, pl.ds(piece * _PIECE, _PIECE)], layout=_ALONG)
            x = x - jnp.sum(_spread(a, 1) * X[piece], axis=1)
        piece = i // _PIECE
        X[piece] = jnp.where(row == i % _PIECE, _spread(x, 2), X[piece])
        blocks.at[:, HALF + i, :][...] = x


def _split(value: jax.Array) -> list[jax.Array]:
    """bf16 terms whose sum is the fp32 value but for its last bit."""
    terms = []
    for _ in range(_TERMS):
        # Held together, for LLVM would round every number once more, by itself.
        terms.append(lax.optimization_barrier(value.astype(jnp.bfloat16)))
        value = value - terms[-1].astype(jnp.float32)
    return terms


def _put(terms: Any, value: jax.Array) -> None:
    # Every warp reads all of a right operand: none may be written before the last has.
    plgpu.commit_smem()
    for i, term in enumerate(_split(value)):
        terms.at[i][...] = term
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


def merge(X: jax.Array, A: jax.Array, terms: Any, dtype: Any) -> jax.Array:
    """The inverse, rounded.

    `X`: the inverses of its blocks, folded; `A`: the first 32 columns of its triangle; `terms`: the second view of `scratch`.
    """
    first = indices(0, HALF) < HALF
    _put(terms, X)
    middle = _product(_split(A), terms, pl.ds(0, HALF))
    _put(terms, middle)
    corner = _product(_split(X), terms, pl.ds(HALF, HALF))
    zero = plgpu.layout_cast(jnp.zeros((ROWS, HALF), jnp.float32), LAYOUT)
    halves = jnp.where(first, X, -corner), jnp.where(first, zero, X)
    # Apart, for LLVM would round number by number and select then.
    return jnp.concatenate([half.astype(dtype) for half in lax.optimization_barrier(halves)], axis=1)
