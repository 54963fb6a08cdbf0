# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `chunk_local_cumsum`: one chunk of BLOCK_SIZE_H heads."""

import triton
import triton.language as tl

from ..ssd._chunks import chunk_in_slot


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "n_sequences", "g_batch_stride"])
def chunk_local_cumsum_kernel(
    g_ptr, out_ptr, cu_seqlens_ptr, n_tokens, n_chunks, n_sequences, g_batch_stride, g_stride,
    H_V: tl.constexpr, BT: tl.constexpr, BLOCK_SIZE_H: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (H_V + BLOCK_SIZE_H - 1) // BLOCK_SIZE_H
    # Offsets are 64-bit: a batch of long prompts has more than 2^31 elements.
    slot = (tl.program_id(0) // BLOCKS).to(tl.int64)
    h = (tl.program_id(0) % BLOCKS) * BLOCK_SIZE_H + tl.arange(0, BLOCK_SIZE_H)
    b, begin, _, length, padding = chunk_in_slot(cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, BT, 0)
    if length == 0:
        return
    t = tl.arange(0, BT)
    mask = (t < length)[:, None] & (h < H_V)[None, :]
    token = begin + t[:, None]
    # What padding holds is not even read.
    kept = mask & (padding == 0)
    g = tl.load(g_ptr + b * g_batch_stride + token * g_stride + h[None, :], mask=kept, other=0.0)
    sums = tl.cumsum(g.to(tl.float32), axis=0)
    tl.store(out_ptr + (b * n_tokens + token) * H_V + h[None, :], sums, mask=mask)
