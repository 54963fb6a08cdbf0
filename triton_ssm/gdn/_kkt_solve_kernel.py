# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""What the combined operator does first with a chunk of one value head, stage by stage: the gate's running sum and the inverse.

`chunk_local_cumsum`, `chunk_scaled_dot_kkt` and `solve_tril` in one: the triangle never leaves the registers.
"""

import triton
import triton.language as tl

from ..ssd._chunks import chunk_in_slot
from ._chunk_scaled_dot_kkt_kernel import dot_kkt
from ._invert import invert
from ._pairs import decayed


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@triton.jit(
    do_not_specialize=[
        "n_tokens", "n_chunks", "n_sequences", "k_batch_stride", "g_batch_stride", "beta_batch_stride",
    ]
)  # fmt: skip
def kkt_solve_kernel(
    k_ptr, g_ptr, beta_ptr, sums_ptr, A_ptr, cu_seqlens_ptr,
    n_tokens, n_chunks, n_sequences, k_batch_stride, g_batch_stride, beta_batch_stride, k_stride, g_stride, beta_stride,
    H_K: tl.constexpr, H_V: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    # Offsets are 64-bit: k and the triangles may have more than 2^31 elements.
    slot = (tl.program_id(0) // H_V).to(tl.int64)
    h = tl.program_id(0) % H_V
    h_k = h // (H_V // H_K)
    b, begin, _, length, padding = chunk_in_slot(cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, BT, 0)
    if padding | (length == 0):
        return
    i = tl.arange(0, BT)
    live = i < length
    token = begin + i
    row = (b * n_tokens + token) * H_V + h
    g = tl.load(g_ptr + b * g_batch_stride + token * g_stride + h, mask=live, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + b * beta_batch_stride + token * beta_stride + h, mask=live, other=0.0).to(tl.float32)
    g = tl.cumsum(g, axis=0)
    tl.store(sums_ptr + row, g, mask=live)
    k_ptr += b * k_batch_stride + h_k * K
    dtype: tl.constexpr = k_ptr.dtype.element_ty

    kk = dot_kkt(k_ptr + begin * k_stride, k_stride, live, K, BT, PRECISION, BLOCK_SIZE_K)
    pairs = (i[:, None] > i[None, :]) & live[:, None]
    A = invert(decayed(kk * beta[:, None], g[:, None], g[None, :], pairs, True), BT)
    tl.store(A_ptr + row[:, None] * BT + i[None, :], A.to(dtype), mask=live[:, None])
