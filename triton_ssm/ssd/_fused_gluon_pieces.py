# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
# A jitted function is Gluon's language in Python's syntax; the types are Gluon's too.
"""`_fused_pieces` and `_numerics` for Gluon, whose tensors have layouts, and what its kernels share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .._numerics import LOG2E

CHUNK = gl.constexpr(64)
_BOUNDS = gl.constexpr(128)


@gluon.jit
def exp(value):
    return gl.exp2(value * LOG2E)


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


@gluon.jit
def chunk_in_slot(cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, PADDING: gl.constexpr):
    """(b, begin, end, padding): tokens from `begin` to before `end`, though no more than CHUNK; none where end <= begin.

    PADDING: whether tokens past the last sequence make chunks.
    """
    if cu_seqlens_ptr is None:
        b = (slot // n_chunks).to(gl.int64)
        begin = (slot % n_chunks).to(gl.int64) * CHUNK
        end = begin * 0 + n_tokens
        padding = b < 0
    else:
        b = slot.to(gl.int64) * 0
        n = sequence_of_slot(cu_seqlens_ptr, slot, CHUNK, n_sequences, n_tokens, 1)
        first = bound(cu_seqlens_ptr, n, n_tokens)
        padding = n == n_sequences
        end = bound(cu_seqlens_ptr, gl.minimum(n + 1, n_sequences), n_tokens)
        c = slot - first // CHUNK - n  # negative only where bounds descend
        # Twice the same, as each kernel was measured: in the other's order ptxas makes other machine code of it.
        if PADDING:
            end = gl.where(padding, n_tokens, end)
            end = gl.where(c >= 0, end, 0)
            begin = first + c * CHUNK
        else:
            begin = first + c * CHUNK
            end = gl.where(n < n_sequences, end, 0)
            end = gl.where(c >= 0, end, 0)
    return b, begin, end, padding
