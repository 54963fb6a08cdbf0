# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `chunk_state`: BLOCK_SIZE_M of headdim by BLOCK_SIZE_N of dstate, BLOCK_SIZE_K tokens a step.

The product is computed as B^T · (x·weight), transposed: the weighted x, which exists in registers alone, is then the right
operand, which tensor cores read from shared memory. As the left one it would stay in registers, and on sm_90 a pipelined
loop can overwrite them while the product of the last step still reads them (vLLM bars such configs for NaN that they met).
B^T goes from global to shared memory untouched. Only fp32 operands cannot: tensor cores read those along tokens from
registers alone, hence no pipeline for fp32.
"""

import triton
import triton.language as tl

from .._numerics import exp
from ._chunks import chunk_in_slot


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "n_sequences", "x_batch_stride", "B_batch_stride"])
def chunk_state_kernel(
    x_ptr, B_ptr, dt_ptr, dA_cumsum_ptr, states_ptr, cu_seqlens_ptr,
    n_tokens, n_chunks, n_sequences, x_batch_stride, B_batch_stride, x_stride, B_stride,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BLOCKS_M: tl.constexpr = (P + BLOCK_SIZE_M - 1) // BLOCK_SIZE_M
    BLOCKS_N: tl.constexpr = (N + BLOCK_SIZE_N - 1) // BLOCK_SIZE_N
    pid = tl.program_id(0)
    # Offsets are 64-bit: x and the states may have more than 2^31 elements.
    slot = (pid // (BLOCKS_M * BLOCKS_N * H)).to(tl.int64)
    h = (pid // (BLOCKS_M * BLOCKS_N)) % H
    p = (pid // BLOCKS_N % BLOCKS_M) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    n = (pid % BLOCKS_N) * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    b, _, row, length, padding = chunk_in_slot(cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, L, ALIGNED)
    if padding | (length == 0):
        return
    in_headdim, in_dstate = p < P, n < N
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_ptr += b * x_batch_stride + row * x_stride + h * P
    B_ptr += b * B_batch_stride + row * B_stride + h // (H // G) * N
    chunk = ((b * H + h) * n_chunks + slot % n_chunks) * L
    dt_ptr += chunk
    dA_cumsum_ptr += chunk
    total = tl.load(dA_cumsum_ptr + L - 1)

    state = tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_M), tl.float32)
    for k0 in tl.range(0, length, BLOCK_SIZE_K, num_stages=STAGES if dtype != tl.float32 else 1):
        k = k0 + tl.arange(0, BLOCK_SIZE_K)
        live = k < length
        Bt = tl.load(B_ptr + k[None, :] * B_stride + n[:, None], mask=in_dstate[:, None] & live[None, :], other=0.0)
        x = tl.load(x_ptr + k[:, None] * x_stride + p[None, :], mask=live[:, None] & in_headdim[None, :], other=0.0)
        a = tl.load(dA_cumsum_ptr + k, mask=live, other=0.0)
        weight = exp(tl.minimum(total - a, 0.0)) * tl.load(dt_ptr + k, mask=live, other=0.0)
        # A select: the weight of no token may be NaN.
        weighted = tl.where(live[:, None], x.to(tl.float32) * weight[:, None], 0.0).to(dtype)
        state = tl.dot(Bt, weighted, state, input_precision=PRECISION)
    out = states_ptr + ((slot * H + h) * P + p[None, :]) * N + n[:, None]
    tl.store(out, state, mask=in_dstate[:, None] & in_headdim[None, :])
