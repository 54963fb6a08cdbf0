# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""Which tokens stand in a chunk slot: sequence n's chunk c is in slot cu_seqlens[n] // L + n + c, so no table is needed.

A program counts the sequences whose first slot is not after its own. That is one load of a block of bounds where a binary
search would wait for a load a step. The tokens past the last sequence count as one more sequence, of padding.
"""

import triton
import triton.language as tl

_BOUNDS = tl.constexpr(128)


@triton.jit
def bound(cu_seqlens_ptr, n, n_tokens):
    # Bounds are data: whatever they hold, no row outside [0, n_tokens) is touched.
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + n).to(tl.int64), 0), n_tokens)


@triton.jit
def sequence_of_slot(cu_seqlens_ptr, slot, n_sequences, n_tokens, L: tl.constexpr):
    """The last n in [0, n_sequences] whose first slot is not after `slot`."""
    found = n_sequences * 0
    for first in range(1, n_sequences + 1, _BOUNDS):
        n = first + tl.arange(0, _BOUNDS)
        given = n <= n_sequences
        begin = tl.load(cu_seqlens_ptr + n, mask=given, other=0).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), n_tokens)
        found += tl.sum((given & (begin // L + n <= slot)).to(tl.int32), axis=0)
    return found


@triton.jit
def chunk_in_slot(
    cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, L: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """(b, begin, row, length, padding): `length` tokens from `begin` on in batch row b, 0 where no chunk stands.

    `row` is the first one's row in tensors whose sequences begin at whole chunks of ALIGNED tokens (0: the same as begin).
    `padding`: the tokens are past the last sequence.
    """
    if cu_seqlens_ptr is None:
        b = slot // n_chunks
        begin = (slot % n_chunks) * L
        row = begin
        end = begin * 0 + n_tokens
        padding = b < 0
    else:
        b = slot * 0
        n = sequence_of_slot(cu_seqlens_ptr, slot, n_sequences, n_tokens, L)
        first = bound(cu_seqlens_ptr, n, n_tokens)
        padding = n == n_sequences
        end = bound(cu_seqlens_ptr, tl.minimum(n + 1, n_sequences), n_tokens)
        end = tl.where(padding, n_tokens, end)
        c = slot - first // L - n
        end = tl.where(c >= 0, end, 0)  # negative only where bounds descend
        begin = first + c * L
        row = begin
        if ALIGNED > 0:
            row = ALIGNED * (first // ALIGNED + n) + c * L
    length = tl.maximum(tl.minimum(end - begin, L), 0).to(tl.int32)
    return b, begin, row, length, padding
