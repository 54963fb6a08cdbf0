# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `chunk_cumsum`: one chunk of BLOCK_SIZE_H heads, read token by token as dt lies, written head by head."""

import triton
import triton.language as tl

from .._numerics import softplus
from ._chunks import chunk_in_slot


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "n_sequences", "dt_batch_stride"])
def chunk_cumsum_kernel(
    dt_ptr, A_ptr, dt_bias_ptr, dA_cumsum_ptr, step_ptr, cu_seqlens_ptr,
    n_tokens, n_chunks, n_sequences, dt_batch_stride, dt_stride, dt_min, dt_max,
    H: tl.constexpr, L: tl.constexpr, DT_SOFTPLUS: tl.constexpr,
    BLOCK_SIZE_H: tl.constexpr, BLOCK_SIZE_T: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (H + BLOCK_SIZE_H - 1) // BLOCK_SIZE_H
    # Offsets are 64-bit: a batch of long prompts has more than 2^31 elements.
    slot = (tl.program_id(0) // BLOCKS).to(tl.int64)
    h = (tl.program_id(0) % BLOCKS) * BLOCK_SIZE_H + tl.arange(0, BLOCK_SIZE_H)
    b, begin, _, length, padding = chunk_in_slot(cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, L, 0)
    if padding | (length == 0):
        return
    in_heads = h < H
    A = tl.load(A_ptr + h, mask=in_heads, other=0.0).to(tl.float32)
    bias = tl.zeros((BLOCK_SIZE_H,), tl.float32)
    if dt_bias_ptr is not None:
        bias = tl.load(dt_bias_ptr + h, mask=in_heads, other=0.0).to(tl.float32)
    dt_ptr += b * dt_batch_stride
    out = ((b * H + h) * n_chunks + slot % n_chunks) * L

    total = tl.zeros((BLOCK_SIZE_H,), tl.float32)
    for t0 in range(0, L, BLOCK_SIZE_T):
        t = t0 + tl.arange(0, BLOCK_SIZE_T)
        token = begin + t
        mask = in_heads[:, None] & (t < length)[None, :]
        step = tl.load(dt_ptr + token[None, :] * dt_stride + h[:, None], mask=mask, other=0.0).to(tl.float32)
        step += bias[:, None]
        if DT_SOFTPLUS:
            step = softplus(step)
        # Not minimum and maximum, which would turn a NaN into a limit.
        step = tl.where(step < dt_min, dt_min, step)
        step = tl.where(step > dt_max, dt_max, step)
        # Past the chunk's end nothing happens, so that the last entry is the chunk's total.
        step = tl.where(mask, step, 0.0)
        dA = step * A[:, None]
        place = out[:, None] + t[None, :]
        tl.store(dA_cumsum_ptr + place, total[:, None] + tl.cumsum(dA, axis=1), mask=in_heads[:, None])
        tl.store(step_ptr + place, step, mask=in_heads[:, None])
        if BLOCK_SIZE_T < L:
            total += tl.sum(dA, axis=1)
