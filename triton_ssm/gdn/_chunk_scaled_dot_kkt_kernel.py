# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `chunk_scaled_dot_kkt`: one chunk of a key head; its products serve all the value heads that read it."""

import triton
import triton.language as tl

from ..ssd._chunks import chunk_in_slot
from ._pairs import decayed, load_gate


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "n_sequences", "k_batch_stride", "beta_batch_stride"])
def chunk_scaled_dot_kkt_kernel(
    k_ptr, beta_ptr, g_ptr, A_ptr, cu_seqlens_ptr,
    n_tokens, n_chunks, n_sequences, k_batch_stride, beta_batch_stride, k_stride, beta_stride,
    H_K: tl.constexpr, H_V: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = H_V // H_K
    # Offsets are 64-bit: k and the products may have more than 2^31 elements.
    slot = (tl.program_id(0) // H_K).to(tl.int64)
    h_k = tl.program_id(0) % H_K
    b, begin, _, length, padding = chunk_in_slot(cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, BT, 0)
    if length == 0:
        return
    i = tl.arange(0, BT)
    live = i < length
    token = begin + i
    A_ptr += ((b * n_tokens + token[:, None]) * H_V + h_k * HEADS) * BT + i[None, :]
    if padding:
        for r in range(HEADS):
            tl.store(A_ptr + r * BT, tl.zeros((BT, BT), tl.float32), mask=live[:, None])
        return
    kk = dot_kkt(
        k_ptr + b * k_batch_stride + begin * k_stride + h_k * K, k_stride, live, K, BT, PRECISION, BLOCK_SIZE_K
    )
    beta_ptr += b * beta_batch_stride + token * beta_stride + h_k * HEADS
    if g_ptr is not None:
        g_ptr += b * n_tokens * H_V + h_k * HEADS
    pairs = (i[:, None] > i[None, :]) & live[:, None]
    for r in range(HEADS):
        A = kk * tl.load(beta_ptr + r, mask=live, other=0.0).to(tl.float32)[:, None]
        if g_ptr is not None:
            g = load_gate(g_ptr + r, token, live, H_V)
            A = decayed(A, g[:, None], g[None, :], pairs, True)
        else:
            A = decayed(A, 0.0, 0.0, pairs, False)
        tl.store(A_ptr + r * BT, A, mask=live[:, None])


@triton.jit
def dot_kkt(
    k_ptr, k_stride, live, K: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_SIZE_K: tl.constexpr
):  # fmt: skip
    """[BT,BT] fp32; `k_ptr` at the chunk's first token and head. Both operands come from memory as they lie there."""
    i = tl.arange(0, BT)
    kk = tl.zeros((BT, BT), tl.float32)
    for k0 in tl.static_range(0, K, BLOCK_SIZE_K):
        d = k0 + tl.arange(0, BLOCK_SIZE_K)
        k = tl.load(k_ptr + i[:, None] * k_stride + d[None, :], mask=live[:, None] & (d < K)[None, :], other=0.0)
        kk = tl.dot(k, tl.trans(k), kk, input_precision=PRECISION)
    return kk
