# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `chunk_o`: one chunk by BLOCK_SIZE_V columns of HEADS value heads, which share the products of q and k.

o is computed transposed, as h^T·q^T and v^T·P^T: P, which exists in registers alone, is then the right operand, which tensor
cores read from shared memory. As the left one it would stay in registers, and on sm_90 a pipelined loop can overwrite them
while the product of the last step still reads them. v^T, h^T and k come from memory as they lie there (but for h of another
dtype, and fp32, which tensor cores read along tokens from registers alone: no pipeline for either).
"""

import triton
import triton.language as tl

from .._numerics import exp
from ..ssd._chunks import chunk_in_slot
from ._pairs import load_gate


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@triton.jit(
    do_not_specialize=["n_tokens", "n_chunks", "n_sequences", "q_batch_stride", "k_batch_stride", "v_batch_stride"]
)
def chunk_o_kernel(
    q_ptr, k_ptr, v_ptr, h_ptr, g_ptr, o_ptr, cu_seqlens_ptr,
    n_tokens, n_chunks, n_sequences, q_batch_stride, k_batch_stride, v_batch_stride, q_stride, k_stride, v_stride, scale,
    H_K: tl.constexpr, H_V: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BASE_2: tl.constexpr,
    V_FIRST: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    BLOCK_SIZE_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """HEADS divides H_V // H_K."""
    BLOCKS: tl.constexpr = (V + BLOCK_SIZE_V - 1) // BLOCK_SIZE_V
    ONE_BLOCK: tl.constexpr = BLOCK_SIZE_K >= K
    pid = tl.program_id(0)
    # Offsets are 64-bit: the tensors and the states may have more than 2^31 elements.
    slot = (pid // (BLOCKS * (H_V // HEADS))).to(tl.int64)
    h = (pid // BLOCKS % (H_V // HEADS)) * HEADS
    h_k = h // (H_V // H_K)
    v = (pid % BLOCKS) * BLOCK_SIZE_V + tl.arange(0, BLOCK_SIZE_V)
    i = tl.arange(0, BT)
    in_V = v < V
    b, begin, _, length, padding = chunk_in_slot(cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, BT, 0)
    if length == 0:
        return
    live = i < length
    token = begin + i
    in_o = in_V[:, None] & live[None, :]
    o_ptr += ((b * n_tokens + token[None, :]) * H_V + h) * V + v[:, None]
    if padding:
        for r in range(HEADS):
            tl.store(o_ptr + r * V, tl.zeros((BLOCK_SIZE_V, BT), o_ptr.dtype.element_ty), mask=in_o)
        return
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    AS_THEY_LIE: tl.constexpr = h_ptr.dtype.element_ty == dtype and dtype != tl.float32
    q_ptr += b * q_batch_stride + token[None, :] * q_stride + h_k * K
    k_ptr += b * k_batch_stride + token[:, None] * k_stride + h_k * K
    v_ptr += b * v_batch_stride + token[None, :] * v_stride + h * V + v[:, None]
    h_ptr += (slot * H_V + h) * (K * V)
    if g_ptr is not None:
        g_ptr += b * n_tokens * H_V + h

    if HEADS == 1 and ONE_BLOCK:
        # All that is needed is asked for at once, before the first product has to wait for its share.
        vt = tl.load(v_ptr, mask=in_o, other=0.0)
        ht = _load_ht(h_ptr, v, 0, K, V, V_FIRST, BLOCK_SIZE_K)
    kq = tl.zeros((BT, BT), tl.float32)
    for k0 in tl.static_range(0, K, BLOCK_SIZE_K):
        d = k0 + tl.arange(0, BLOCK_SIZE_K)
        qt = tl.load(q_ptr + d[:, None], mask=(d < K)[:, None] & live[None, :], other=0.0)
        k = tl.load(k_ptr + d[None, :], mask=live[:, None] & (d < K)[None, :], other=0.0)
        kq = tl.dot(k, qt, kq, input_precision=PRECISION)
    pairs = (i[:, None] <= i[None, :]) & live[None, :]
    for r in tl.range(0, HEADS, num_stages=STAGES if AS_THEY_LIE else 1):
        if HEADS > 1 or not ONE_BLOCK:
            vt = tl.load(v_ptr + r * V, mask=in_o, other=0.0)
        ot = tl.zeros((BLOCK_SIZE_V, BT), tl.float32)
        for k0 in tl.static_range(0, K, BLOCK_SIZE_K):
            if not ONE_BLOCK:
                d = k0 + tl.arange(0, BLOCK_SIZE_K)
                qt = tl.load(q_ptr + d[:, None], mask=(d < K)[:, None] & live[None, :], other=0.0)
            if HEADS > 1 or not ONE_BLOCK:
                ht = _load_ht(h_ptr + r * (K * V), v, k0, K, V, V_FIRST, BLOCK_SIZE_K)
            ot = tl.dot(ht.to(dtype), qt, ot, input_precision=PRECISION)
        P = kq
        if g_ptr is not None:
            g = load_gate(g_ptr + r, token, live, H_V)
            # Masked before the exp: a gate may be of either sign.
            difference = tl.where(pairs, g[None, :] - g[:, None], 0.0)
            if BASE_2:
                ot *= tl.exp2(g)[None, :]
                P = kq * tl.exp2(difference)
            else:
                ot *= exp(g)[None, :]
                P = kq * exp(difference)
        P = tl.where(pairs, P, 0.0)
        ot = tl.dot(vt, P.to(dtype), ot, input_precision=PRECISION)
        tl.store(o_ptr + r * V, (ot * scale).to(o_ptr.dtype.element_ty), mask=in_o)


@triton.jit
def _load_ht(h_ptr, v, k0, K: tl.constexpr, V: tl.constexpr, V_FIRST: tl.constexpr, BLOCK_SIZE_K: tl.constexpr):
    """[BLOCK_SIZE_V,BLOCK_SIZE_K] of a state, whichever way it lies."""
    d = k0 + tl.arange(0, BLOCK_SIZE_K)
    if V_FIRST:
        offset = v[:, None] * K + d[None, :]
    else:
        offset = d[None, :] * V + v[:, None]
    return tl.load(h_ptr + offset, mask=(v < V)[:, None] & (d < K)[None, :], other=0.0)
