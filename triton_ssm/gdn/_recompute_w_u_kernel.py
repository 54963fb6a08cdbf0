# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `recompute_w_u`: one chunk of a value head.

The inverse is the left operand of every product here, and rounded from fp32 it may be one in registers. On sm_90 a pipelined
loop can overwrite such an operand while the product of the last step still reads it; so there is no loop: the blocks of K and
V are written out one after another. Four warps are no legal config at all, for with 64 tokens compilers of this age have been
seen to get kernels of this kind wrong.
"""

import triton
import triton.language as tl

from .._numerics import exp
from ..ssd._chunks import chunk_in_slot
from ._pairs import load_gate


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@triton.jit(
    do_not_specialize=["n_tokens", "n_chunks", "n_sequences", "k_batch_stride", "v_batch_stride", "beta_batch_stride"]
)
def recompute_w_u_kernel(
    k_ptr, v_ptr, beta_ptr, A_ptr, g_ptr, w_ptr, u_ptr, cu_seqlens_ptr,
    n_tokens, n_chunks, n_sequences, k_batch_stride, v_batch_stride, beta_batch_stride, k_stride, v_stride, beta_stride,
    H_K: tl.constexpr, H_V: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, ZERO_PADDING: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, BLOCK_SIZE_V: tl.constexpr,
):  # fmt: skip
    # Offsets are 64-bit: k, v and what comes of them may have more than 2^31 elements.
    slot = (tl.program_id(0) // H_V).to(tl.int64)
    h = tl.program_id(0) % H_V
    b, begin, _, length, padding = chunk_in_slot(cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, BT, 0)
    if length == 0:
        return
    i = tl.arange(0, BT)
    live = i < length
    token = begin + i
    row = (b * n_tokens + token) * H_V + h
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    if padding:
        if ZERO_PADDING:
            for k0 in tl.static_range(0, K, BLOCK_SIZE_K):
                zero = tl.zeros((BT, BLOCK_SIZE_K), dtype)
                store_rows(w_ptr + row[:, None] * K, zero, k0, live, K, BLOCK_SIZE_K)
            for v0 in tl.static_range(0, V, BLOCK_SIZE_V):
                zero = tl.zeros((BT, BLOCK_SIZE_V), dtype)
                store_rows(u_ptr + row[:, None] * V, zero, v0, live, V, BLOCK_SIZE_V)
        return

    A = tl.load(A_ptr + row[:, None] * BT + i[None, :], mask=live[:, None] & live[None, :], other=0.0).to(dtype)
    beta = tl.load(beta_ptr + b * beta_batch_stride + token * beta_stride + h, mask=live, other=0.0).to(tl.float32)
    gated = beta
    if g_ptr is not None:
        gated = beta * exp(load_gate(g_ptr + b * n_tokens * H_V + h, token, live, H_V))
    k_ptr += b * k_batch_stride + token[:, None] * k_stride + h // (H_V // H_K) * K
    v_ptr += b * v_batch_stride + token[:, None] * v_stride + h * V
    # The first blocks are asked for before the first product has to wait for its share.
    k = load_rows(k_ptr, 0, live, K, BLOCK_SIZE_K)
    v = load_rows(v_ptr, 0, live, V, BLOCK_SIZE_V)
    for k0 in tl.static_range(0, K, BLOCK_SIZE_K):
        if k0 > 0:
            k = load_rows(k_ptr, k0, live, K, BLOCK_SIZE_K)
        w = tl.dot(A, (k.to(tl.float32) * gated[:, None]).to(dtype), input_precision=PRECISION)
        store_rows(w_ptr + row[:, None] * K, w.to(dtype), k0, live, K, BLOCK_SIZE_K)
    for v0 in tl.static_range(0, V, BLOCK_SIZE_V):
        if v0 > 0:
            v = load_rows(v_ptr, v0, live, V, BLOCK_SIZE_V)
        u = tl.dot(A, (v.to(tl.float32) * beta[:, None]).to(dtype), input_precision=PRECISION)
        store_rows(u_ptr + row[:, None] * V, u.to(dtype), v0, live, V, BLOCK_SIZE_V)


@triton.jit
def load_rows(ptr, first, live, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of every row."""
    e = first + tl.arange(0, BLOCK)
    return tl.load(ptr + e[None, :], mask=live[:, None] & (e < SIZE)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, rows, first, live, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    e = first + tl.arange(0, BLOCK)
    tl.store(ptr + e[None, :], rows, mask=live[:, None] & (e < SIZE)[None, :])
