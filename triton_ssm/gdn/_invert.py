# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""(I + A)^-1 of a strictly lower triangle, in fp32 and in registers: forward substitution by blocks, from 2 x 2 to the whole.

    (I + [A11  0 ])^-1 = [  X1            0 ]        X1 = (I + A11)^-1, X2 = (I + A22)^-1
         [A21 A22]       [-X2·A21·X1     X2 ]

Substitution, and no product of powers of A, because keys that resemble each other make A's powers grow like binomials before
they vanish: 16 tokens of one key, written at nearly full strength without decay, cost three digits and 64 of them every one.
The inverse stays small, and so does every number here. Up to 16 x 16 a step takes whole 16 x 16 products, of which most factors
are zero, since no smaller product exists; even so it is half the work of going row by row, which waits at every row. The
products are fp32 multiplications, not split ones on tensor cores: those cost as much in splitting as they save.
"""

import triton
import triton.language as tl

_BLOCK = tl.constexpr(16)


@triton.jit
def invert(A, BT: tl.constexpr):
    """A: [BT,BT] fp32, zero on the diagonal and above; BT 16, 32 or 64."""
    X = _invert_diagonal_blocks(A, BT)
    if BT >= 32:
        X = _merge_pairs(X, A, BT, 16)
    if BT >= 64:
        X = _merge_pairs(X, A, BT, 32)
    return tl.reshape(X, (BT, BT))


@triton.jit
def _invert_diagonal_blocks(A, BT: tl.constexpr):
    """[16,16] of BT = 16, else [BT // 16, 16, 16]: the inverses of the blocks on the diagonal."""
    BLOCKS: tl.constexpr = BT // _BLOCK
    D = A
    if BLOCKS > 1:
        D = _diagonal(tl.reshape(A, (BLOCKS, _BLOCK, BLOCKS, _BLOCK)), BLOCKS)
    i, j = tl.arange(0, _BLOCK)[:, None], tl.arange(0, _BLOCK)[None, :]
    X = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, D, 0.0)
    for level in tl.static_range(1, 4):
        # All A21 of this size at once: X·A21·X is then every X2·A21·X1 in its place.
        A21 = tl.where(((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) != (j >> level)), D, 0.0)
        X -= tl.dot(tl.dot(X, A21, input_precision="ieee"), X, input_precision="ieee")
    return X


@triton.jit
def _diagonal(blocks, N: tl.constexpr):
    """[N,S,N,S] to [N,S,S]: the blocks on the diagonal."""
    n = tl.arange(0, N)
    return tl.sum(tl.where(n[:, None, None, None] == n[None, None, :, None], blocks, 0.0), axis=2)


@triton.jit
def _merge_pairs(X, A, BT: tl.constexpr, S: tl.constexpr):
    """[2n,S,S] to [n,2S,2S]: the inverses of blocks twice as large."""
    N: tl.constexpr = BT // (2 * S)
    # Rows of a pair's second half by columns of its first.
    left, _ = tl.split(tl.permute(tl.reshape(A, (N, 2, S, N, 2, S)), (0, 1, 2, 3, 5, 4)))
    _, corner = tl.split(tl.permute(left, (0, 2, 3, 4, 1)))
    X1, X2 = tl.split(tl.permute(tl.reshape(X, (N, 2, S, S)), (0, 2, 3, 1)))
    if N > 1:
        A21 = _diagonal(corner, N)
    else:
        A21, X1, X2 = tl.reshape(corner, (S, S)), tl.reshape(X1, (S, S)), tl.reshape(X2, (S, S))
    below = -tl.dot(tl.dot(X2, A21, input_precision="ieee"), X1, input_precision="ieee")
    halves = tl.join(tl.join(X1, tl.zeros_like(X1)), tl.join(below, X2))  # the last axis: rows, the one before: columns
    if N == 1:
        halves = tl.reshape(halves, (1, S, S, 2, 2))
    return tl.reshape(tl.permute(halves, (0, 4, 1, 3, 2)), (N, 2 * S, 2 * S))
