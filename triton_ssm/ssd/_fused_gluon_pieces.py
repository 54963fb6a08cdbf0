# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
# A jitted function is Gluon's language in Python's syntax; the types are Gluon's too.
"""`_fused_pieces` for Gluon, whose tensors have layouts, and what its kernels share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

CHUNK = gl.constexpr(64)
_BOUNDS = gl.constexpr(128)


@gluon.jit
def bound(cu_seqlens_ptr, n, n_tokens):
    return gl.minimum(gl.maximum(gl.load(cu_seqlens_ptr + n).to(gl.int64), 0), n_tokens)


@gluon.jit
def sequence_of_slot(cu_seqlens_ptr, slot, size, n_sequences, n_tokens, ROOM: gl.constexpr):
    n = n_sequences * 0
    for first in range(1, n_sequences + 1, _BOUNDS):
        index = first + gl.arange(0, _BOUNDS, layout=gl.BlockedLayout([1], [32], [4], [0]))
        given = index <= n_sequences
        begin = gl.load(cu_seqlens_ptr + index, mask=given, other=0).to(gl.int64)
        begin = gl.minimum(gl.maximum(begin, 0), n_tokens)
        n += gl.sum((given & (begin // size + index * ROOM <= slot)).to(gl.int32), axis=0)
    return n


@gluon.jit
def row_of(ring, stage, HEADS: gl.constexpr):
    """A stage of decays or weights, of all heads, as one row: two of a chunk for each head."""
    return ring.index(stage)._reinterpret(gl.float32, [HEADS * 2 * CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
