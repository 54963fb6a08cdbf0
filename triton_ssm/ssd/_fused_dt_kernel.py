# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""First kernel of the fused scan: steps and decays of every chunk of 64 tokens, in the form that spares later multiplications.

With a = cumsum(dt·A·log2 e) over the chunk and b = a - log2(dt), both fp32:

    decay(j -> i)·dt[j] = 2^(a[i] - b[j])        weight of token j in the chunk's last state = 2^(a[last] - b[j])

Past the chunk's last token a stays as it is and b is +inf: weight exactly 0. A step of 0 gives the same b.
Rows of y that belong to no sequence are set to zero here, because no later program looks at them.
"""

import triton
import triton.language as tl

from .._numerics import LOG2E, softplus
from ._fused_pieces import CHUNK, bounds_of, first_slot, sequence_of_slot


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@triton.jit(do_not_specialize=["n_tokens", "chunks_per_row", "n_sequences"])
def fused_dt_kernel(
    dt_ptr, A_ptr, dt_bias_ptr, ab_ptr, y_ptr, cu_seqlens_ptr,
    n_tokens, chunks_per_row, n_sequences, dt_stride, dt_min, dt_max,
    H: tl.constexpr, P: tl.constexpr, DT_SOFTPLUS: tl.constexpr, BLOCK_SIZE_H: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (H + BLOCK_SIZE_H - 1) // BLOCK_SIZE_H
    slot = tl.program_id(0) // BLOCKS
    h0 = (tl.program_id(0) % BLOCKS) * BLOCK_SIZE_H
    h = h0 + tl.arange(0, BLOCK_SIZE_H)
    n = sequence_of_slot(cu_seqlens_ptr, slot, chunks_per_row, CHUNK, n_sequences, n_tokens, 1)
    begin, end = bounds_of(cu_seqlens_ptr, n, n_sequences, n_tokens)
    c = slot - first_slot(cu_seqlens_ptr, n, begin, chunks_per_row, CHUNK, 1)
    t = begin + c * CHUNK + tl.arange(0, CHUNK)
    if cu_seqlens_ptr is not None:
        if n == n_sequences:
            columns: tl.constexpr = 256
            for first in range(0, BLOCK_SIZE_H * P, columns):
                column = first + tl.arange(0, columns)
                mask = (t < n_tokens)[:, None] & ((column < BLOCK_SIZE_H * P) & (h0 * P + column < H * P))[None, :]
                y = y_ptr + t[:, None] * (H * P) + (h0 * P + column)[None, :]
                tl.store(y, tl.zeros((CHUNK, columns), y_ptr.dtype.element_ty), mask=mask)
            return
        if (c < 0) | (begin + c * CHUNK >= end):
            return
    in_heads = h < H
    mask = in_heads[:, None] & (t < end)[None, :]
    step = tl.load(dt_ptr + t[None, :] * dt_stride + h[:, None], mask=mask, other=0.0).to(tl.float32)
    if dt_bias_ptr is not None:
        step += tl.load(dt_bias_ptr + h, mask=in_heads, other=0.0).to(tl.float32)[:, None]
    if DT_SOFTPLUS:
        step = softplus(step)
    # Not minimum and maximum, which would turn a NaN into a limit.
    step = tl.where(step < dt_min, dt_min, step)
    step = tl.where(step > dt_max, dt_max, step)
    step = tl.where(mask, step, 0.0)
    A = tl.load(A_ptr + h, mask=in_heads, other=0.0).to(tl.float32) * LOG2E
    a = tl.cumsum(step * A[:, None], axis=1)
    b = tl.where(step == 0.0, float("inf"), a - tl.log2(tl.where(step == 0.0, 1.0, step)))
    out = ab_ptr + (slot.to(tl.int64) * H + h)[:, None] * (2 * CHUNK) + tl.arange(0, CHUNK)[None, :]
    tl.store(out, a, mask=in_heads[:, None])
    tl.store(out + CHUNK, b, mask=in_heads[:, None])
