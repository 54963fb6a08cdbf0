# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""Where the pieces of a sequence stand. A piece is some chunks of 64 tokens of one sequence; pieces run in parallel.

Packed, sequence n's piece k of S tokens is in slot cu_seqlens[n] // S + n + k, as chunks are (`contracts.ssd`): a program
counts the sequences that begin before its slot and needs no table. Where only whole pieces count, their slots are
cu_seqlens[n] // S + k, T // S in all: no two pieces begin within S tokens. ROOM tells the two apart: 1 or 0.
Dense, every batch row has the same number of slots. Tokens are counted over all batch rows, so that dense batches and packed
sequences look alike from here on.
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
_BOUNDS = tl.constexpr(128)


@triton.jit
def bound(cu_seqlens_ptr, n, n_tokens):
    # Bounds are data: whatever they hold, no row outside [0, n_tokens) is touched.
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + n).to(tl.int64), 0), n_tokens)


@triton.jit
def bounds_of(cu_seqlens_ptr, n, n_sequences, n_tokens):
    """(begin, end) of sequence n's tokens; n = n_sequences: nothing, after the last one."""
    if cu_seqlens_ptr is None:
        begin = n.to(tl.int64) * n_tokens
        end = begin + n_tokens
    else:
        begin = bound(cu_seqlens_ptr, n, n_tokens)
        end = tl.maximum(bound(cu_seqlens_ptr, tl.minimum(n + 1, n_sequences), n_tokens), begin)
    return begin, end


@triton.jit
def first_slot(cu_seqlens_ptr, n, begin, slots_per_row, size, ROOM: tl.constexpr):
    """The slot of a sequence's first chunk or piece of `size` tokens."""
    if cu_seqlens_ptr is None:
        slot = n.to(tl.int64) * slots_per_row
    else:
        slot = begin // size + n * ROOM
    return slot


@triton.jit
def first_row(cu_seqlens_ptr, n, begin, rows_per_row, ALIGNED: tl.constexpr):
    """The row of a sequence's first token in x, B and C; ALIGNED: its rows begin at a whole chunk of that many."""
    if ALIGNED == 0:
        row = begin
    elif cu_seqlens_ptr is None:
        row = n.to(tl.int64) * rows_per_row
    else:
        row = (begin // ALIGNED + n) * ALIGNED
    return row


@triton.jit
def sequence_of_slot(cu_seqlens_ptr, slot, slots_per_row, size, n_sequences, n_tokens, ROOM: tl.constexpr):
    """The sequence that a slot for `size` tokens belongs to; n_sequences: it is past the last one's."""
    if cu_seqlens_ptr is None:
        n = slot // slots_per_row
    else:
        n = n_sequences * 0
        for first in range(1, n_sequences + 1, _BOUNDS):
            index = first + tl.arange(0, _BOUNDS)
            given = index <= n_sequences
            begin = tl.load(cu_seqlens_ptr + index, mask=given, other=0).to(tl.int64)
            begin = tl.minimum(tl.maximum(begin, 0), n_tokens)
            n += tl.sum((given & (begin // size + index * ROOM <= slot)).to(tl.int32), axis=0)
    return n
