# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `solve_tril`: one chunk of a head, inverted in registers."""

import triton
import triton.language as tl

from ..ssd._chunks import chunk_in_slot
from ._invert import invert


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "n_sequences"])
def solve_tril_kernel(
    out_ptr, A_ptr, A_desc, cu_seqlens_ptr, n_tokens, n_chunks, n_sequences, H_V: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """A comes by its descriptor where there is one: of [B·T, H_V·BT], in tiles of [BT,BT]."""
    # Offsets are 64-bit: A may have more than 2^31 elements.
    slot = (tl.program_id(0) // H_V).to(tl.int64)
    h = tl.program_id(0) % H_V
    b, begin, _, length, padding = chunk_in_slot(cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, BT, 0)
    if length == 0:
        return
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    offset = ((b * n_tokens + begin + i) * H_V + h) * BT + j
    if padding:
        tl.store(out_ptr + offset, tl.zeros((BT, BT), out_ptr.dtype.element_ty), mask=i < length)
        return
    below = (j < i) & (i < length)
    if A_desc is not None:
        # The tile's last rows may be another sequence's.
        A = tl.where(below, A_desc.load([(b * n_tokens + begin).to(tl.int32), h * BT]), 0.0)
    else:
        A = tl.load(A_ptr + offset, mask=below, other=0.0)
    tl.store(out_ptr + offset, invert(A, BT).to(out_ptr.dtype.element_ty), mask=(i < length) & (j < BT))
