# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
# A jitted function is Gluon's language in Python's syntax; the types are Gluon's too.
"""(I + A)^-1 of strictly lower 64 x 64 triangles of HEADS heads, in fp32 and by four warps: substitution, then two merges.

    (I + [A11  0 ])^-1 = [  X1            0 ]        X1 = (I + A11)^-1, X2 = (I + A22)^-1
         [A21 A22]       [-X2·A21·X1     X2 ]

Substitution, and no product of powers of A, for the reasons that `_invert` gives. The four 16 x 16 blocks on the diagonal are
inverted at once: a thread has one column of an inverse in registers and goes down its rows, which waits for nobody; the rows of
A come from shared memory. A merge is two products on tensor cores, of operands split into two tf32 terms each: what is lost
of a factor is 2^-22 of it.

Blocks stand in shared memory by what a merge does with them: [2, blocks of a head // 2, HEADS], the first of every pair before
all the second ones.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

_BLOCK = gl.constexpr(16)
_DENSE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]))
# Of rows of 32 numbers: eight of them in one column do not meet in a bank.
_SWIZZLED = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, [3, 2, 1, 0]))


@gluon.jit
def room(HEADS: gl.constexpr):
    """Shared memory of `put`: blocks on the diagonal, those left of them, and the corner."""
    diagonal = gl.allocate_shared_memory(gl.float32, [4, HEADS, _BLOCK, _BLOCK], _DENSE)
    left = gl.allocate_shared_memory(gl.float32, [4, HEADS, _BLOCK, _BLOCK], _DENSE)
    corner = gl.allocate_shared_memory(gl.float32, [2, HEADS, 2 * _BLOCK, 2 * _BLOCK], _SWIZZLED)
    return diagonal, left, corner


@gluon.jit
def halves(x):
    """The columns' two halves."""
    return gl.split(gl.permute(gl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@gluon.jit
def _blocks(x):
    """[64,16] to [4,1,16,16], the even blocks first."""
    return gl.reshape(gl.permute(gl.reshape(x, (2, 2, _BLOCK, _BLOCK)), (1, 0, 2, 3)), (4, 1, _BLOCK, _BLOCK))


@gluon.jit
def put(A, diagonal, left, corner, r: gl.constexpr):
    """The triangle of head r, in registers, to where `invert` wants it."""
    near, far = halves(A)
    c0, c1 = halves(near)
    c2, c3 = halves(far)
    i = gl.arange(0, 64, layout=gl.SliceLayout(1, c0.type.layout))[:, None]
    own = gl.where(i < 32, gl.where(i < 16, c0, c1), gl.where(i < 48, c2, c3))
    diagonal.slice(r, 1, 1).store(_blocks(own))
    # Of the odd blocks, what stands left of them in their pair; of the even ones nothing that is read.
    left.slice(r, 1, 1).store(_blocks(gl.where(i < 32, c0, c2)))
    corner.slice(r, 1, 1).store(gl.reshape(near, (2, 1, 32, 32)))


@gluon.jit
def _row(x, row, piece, i: gl.constexpr):
    """`piece`, with x in place of its row i."""
    return gl.where(row == i, gl.expand_dims(x, 2), piece)


@gluon.jit
def _minus(x, diagonal, piece, layout: gl.constexpr, i: gl.constexpr, j: gl.constexpr):
    """x - A[i, j:j+4]·piece. One load serves all columns."""
    a = diagonal.slice(i, 1, 1).slice(j, 4, 2).load(gl.SliceLayout(3, layout))
    return x - gl.sum(gl.expand_dims(a, 3) * piece, axis=2)


@gluon.jit
def _substitute(diagonal, HEADS: gl.constexpr):
    """In place."""
    BLOCKS: gl.constexpr = 4 * HEADS
    # A warp has two blocks; with one head, two warps do what the other two do as well.
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 4, 1], [2, 1, 1, 16], [2 * HEADS, 1, 1, 2 // HEADS], [3, 2, 1, 0])
    blocks = diagonal.reshape((BLOCKS, _BLOCK, _BLOCK))
    row = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))[None, None, :, None]
    column = gl.arange(0, _BLOCK, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))[None, None, :]
    x0 = gl.zeros((BLOCKS, 1, 4, _BLOCK), gl.float32, layout)
    x1, x2, x3 = x0, x0, x0
    for i in gl.static_range(_BLOCK):
        x = gl.where(column == i, 1.0, 0.0) + gl.zeros((BLOCKS, 1, _BLOCK), gl.float32, gl.SliceLayout(2, layout))
        if i > 0:
            x = _minus(x, blocks, x0, layout, i, 0)
        if i > 4:
            x = _minus(x, blocks, x1, layout, i, 4)
        if i > 8:
            x = _minus(x, blocks, x2, layout, i, 8)
        if i > 12:
            x = _minus(x, blocks, x3, layout, i, 12)
        if i < 4:
            x0 = _row(x, row, x0, i)
        elif i < 8:
            x1 = _row(x, row, x1, i - 4)
        elif i < 12:
            x2 = _row(x, row, x2, i - 8)
        else:
            x3 = _row(x, row, x3, i - 12)
    pieces = gl.permute(gl.join(gl.join(x0, x1), gl.join(x2, x3)), (0, 1, 5, 4, 2, 3))
    blocks.store(gl.reshape(pieces, (BLOCKS, _BLOCK, _BLOCK)))


@gluon.jit
def _split(x):
    """Two terms that tf32 holds; the second as far as the tensor cores read it."""
    first = ((x.to(gl.int32, bitcast=True) + 0x1000) & -0x2000).to(gl.float32, bitcast=True)
    return first, x - first


@gluon.jit
def _dot(a, b, mma: gl.constexpr):
    a0, a1 = _split(a)
    b0, b1 = _split(b)
    sums = gl.zeros((a.shape[0], a.shape[1], b.shape[2]), gl.float32, mma)
    # The smallest first.
    sums = mma_v2(a1, b0, sums, input_precision="tf32")
    sums = mma_v2(a0, b1, sums, input_precision="tf32")
    return mma_v2(a0, b0, sums, input_precision="tf32")


@gluon.jit
def _merge(X, A, mma: gl.constexpr):
    """X: [2N,S,S] in shared memory, A there as well, of which only the second half counts. [N,2S,2S] in registers."""
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 1)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 1)
    N: gl.constexpr = X.shape[0] // 2
    S: gl.constexpr = X.shape[1]
    first, second = X.slice(0, N), X.slice(N, N)
    middle = _dot(A.slice(N, N).load(left), first.load(right), mma)
    below = -_dot(second.load(left), gl.convert_layout(middle, right), mma)
    x1 = first.load(mma)
    x2 = second.load(mma)
    # The last axis: rows, the one before: columns.
    halves = gl.join(gl.join(x1, gl.zeros((N, S, S), gl.float32, mma)), gl.join(below, x2))
    return gl.reshape(gl.permute(halves, (0, 4, 1, 3, 2)), (N, 2 * S, 2 * S))


@gluon.jit
def invert(diagonal, left, corner, HEADS: gl.constexpr):
    """[HEADS,64,64] of what `put` left, which is overwritten."""
    PAIRS: gl.constexpr = 2 * HEADS
    _substitute(diagonal, HEADS)
    shape: gl.constexpr = [2 * PAIRS, _BLOCK, _BLOCK]
    narrow: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [PAIRS, 1, 2 // HEADS], [1, 16, 8])
    X = _merge(diagonal.reshape(shape), left.reshape(shape), narrow)
    half = gl.allocate_shared_memory(gl.float32, [PAIRS, 32, 32], gl.SwizzledSharedLayout(4, 1, 8, [2, 1, 0]), X)
    wide: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [HEADS, 2, 2 // HEADS], [1, 16, 8])
    return _merge(half, corner.reshape((PAIRS, 32, 32)), wide)
