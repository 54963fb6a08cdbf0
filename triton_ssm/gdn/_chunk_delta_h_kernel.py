# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `chunk_delta_h`: BLOCK_SIZE_V columns of one head's state, carried in fp32 through a sequence's chunks.

Both left operands (w and k^T) come from memory as they lie there. What is computed in the loop, the rounded state and v_new,
is a right operand, which tensor cores read from shared memory. As a left one it would stay in registers, which on sm_90 a
pipelined loop can overwrite while the product of the last step still reads them. fp32 operands along tokens tensor cores read
from registers alone: no pipeline for fp32.
"""

import triton
import triton.language as tl

from .._numerics import exp
from ..ssd._chunks import bound


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "n_sequences", "k_batch_stride"])
def chunk_delta_h_kernel(
    k_ptr, w_ptr, u_ptr, g_ptr, initial_ptr, h_ptr, v_new_ptr, final_ptr, cu_seqlens_ptr,
    n_tokens, n_chunks, n_sequences, k_batch_stride, k_stride,
    H_K: tl.constexpr, H_V: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr, BLOCK_SIZE_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_SIZE_K >= K."""
    BLOCKS: tl.constexpr = (V + BLOCK_SIZE_V - 1) // BLOCK_SIZE_V
    HEADS: tl.constexpr = H_V // H_K
    pid = tl.program_id(0)
    # Offsets are 64-bit: the tensors and the states may have more than 2^31 elements.
    n = (pid // (BLOCKS * H_V)).to(tl.int64)
    h = (pid // BLOCKS) % H_V
    v = (pid % BLOCKS) * BLOCK_SIZE_V + tl.arange(0, BLOCK_SIZE_V)
    i, d = tl.arange(0, BT), tl.arange(0, BLOCK_SIZE_K)
    in_K, in_V = d < K, v < V
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    if cu_seqlens_ptr is None:
        b = n
        begin = n * 0
        end = begin + n_tokens
        slot = n * n_chunks
    else:
        b = n * 0
        begin = bound(cu_seqlens_ptr, n, n_tokens)
        end = begin * 0 + n_tokens
        slot = begin // BT + n
        if n == n_sequences:  # the tokens past the last sequence: their rows are zero
            zero = tl.zeros((BT, BLOCK_SIZE_V), dtype)
            for t in range(begin, end, BT):
                row = (t + i[:, None]) * H_V + h
                mask = (t + i < end)[:, None] & in_V[None, :]
                tl.store(v_new_ptr + row * V + v[None, :], zero, mask=mask)
            return
        end = tl.maximum(bound(cu_seqlens_ptr, n + 1, n_tokens), begin)
    length = (end - begin).to(tl.int32)

    # Pointers step from chunk to chunk; what does not change within them is worked out once.
    first = (b * n_tokens + begin) * H_V + h
    k_ptr += b * k_batch_stride + begin * k_stride + h // HEADS * K
    kt_offset = i[None, :] * k_stride + d[:, None]
    w_ptr += first * K
    w_offset = i[:, None] * (H_V * K) + d[None, :]
    u_ptr += first * V
    u_offset = i[:, None] * (H_V * V) + v[None, :]
    if g_ptr is not None:
        g_ptr += first
    h_ptr += (slot * H_V + h) * (K * V)
    v_new_ptr += first * V
    in_state = in_K[:, None] & in_V[None, :]
    state = tl.zeros((BLOCK_SIZE_K, BLOCK_SIZE_V), tl.float32)
    element = d[:, None] * V + v[None, :]
    if initial_ptr is not None:
        state = tl.load(initial_ptr + (n * H_V + h) * (K * V) + element, mask=in_state, other=0.0).to(tl.float32)

    for t in tl.range(0, length, BT, num_stages=STAGES if dtype != tl.float32 else 1):
        live = i < length - t
        in_w, in_u = live[:, None] & in_K[None, :], live[:, None] & in_V[None, :]
        before = state.to(dtype)
        w = tl.load(w_ptr + w_offset, mask=in_w, other=0.0)
        u = tl.load(u_ptr + u_offset, mask=in_u, other=0.0).to(tl.float32)
        # A select: no token, no value, though the state it met were infinite.
        fresh = tl.where(live[:, None], u - tl.dot(w, before, input_precision=PRECISION), 0.0)
        tl.store(h_ptr + element, before, mask=in_state)
        tl.store(v_new_ptr + u_offset, fresh.to(dtype), mask=in_u)
        h_ptr += H_V * K * V
        v_new_ptr += BT * H_V * V
        if g_ptr is not None:
            g = tl.load(g_ptr + i * H_V, mask=live, other=0.0)
            # The last token that lives: its gate is the whole chunk's.
            total = tl.load(g_ptr + (tl.minimum(length - t, BT) - 1) * H_V)
            g_ptr += BT * H_V
            fresh *= exp(tl.where(live, total - g, 0.0))[:, None]
            state *= exp(total)
        kt = tl.load(k_ptr + kt_offset, mask=in_K[:, None] & live[None, :], other=0.0)
        state = tl.dot(kt, fresh.to(dtype), state, input_precision=PRECISION)
        k_ptr += BT * k_stride
        w_ptr += BT * H_V * K
        u_ptr += BT * H_V * V

    if final_ptr is not None:
        tl.store(final_ptr + (n * H_V + h) * (K * V) + element, state, mask=in_state)
