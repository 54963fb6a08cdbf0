# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `chunk_scan`: BLOCK_SIZE_M tokens by BLOCK_SIZE_N of headdim, BLOCK_SIZE_K earlier tokens a step.

y is computed transposed, as x^T · M^T: M, which exists in registers alone, is then the right operand, which tensor cores read
from shared memory. As the left one it would stay in registers, and on sm_90 a pipelined loop can overwrite them while the
product of the last step still reads them: whole rows of NaN, for which vLLM bars configs of num_stages > 1,
num_warps % 4 == 0 and BLOCK_SIZE_M % 64 == 0. x^T goes from global to shared memory untouched. Only fp32 operands
cannot: tensor cores read those along tokens from registers alone, hence no pipeline for fp32. S, rounded in registers, is a
left operand, but in no loop.
"""

import triton
import triton.language as tl

from .._numerics import exp, silu
from ._chunks import chunk_in_slot


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@triton.jit(
    do_not_specialize=["n_tokens", "n_chunks", "n_sequences", "x_batch_stride", "C_batch_stride", "z_batch_stride"]
)
def chunk_scan_kernel(
    CB_ptr, x_ptr, dt_ptr, dA_cumsum_ptr, C_ptr, states_ptr, D_ptr, z_ptr, y_ptr, cu_seqlens_ptr,
    n_tokens, n_chunks, n_sequences, x_batch_stride, C_batch_stride, z_batch_stride, x_stride, C_stride, z_stride,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    D_PER_HEADDIM: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    BLOCK_SIZE_DSTATE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BLOCKS_M: tl.constexpr = L // BLOCK_SIZE_M
    BLOCKS_N: tl.constexpr = (P + BLOCK_SIZE_N - 1) // BLOCK_SIZE_N
    pid = tl.program_id(0)
    # Offsets are 64-bit: x, the products and the states may have more than 2^31 elements.
    slot = (pid // (BLOCKS_M * BLOCKS_N * H)).to(tl.int64)
    h = (pid // (BLOCKS_M * BLOCKS_N)) % H
    g = h // (H // G)
    p = (pid // BLOCKS_M % BLOCKS_N) * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    # The last tokens of a chunk have the most before them: they go first.
    i0 = (BLOCKS_M - 1 - pid % BLOCKS_M) * BLOCK_SIZE_M
    i = i0 + tl.arange(0, BLOCK_SIZE_M)
    b, begin, row, length, padding = chunk_in_slot(cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, L, ALIGNED)
    if i0 >= length:
        return
    in_headdim, in_rows = p < P, i < length
    mask = in_headdim[:, None] & in_rows[None, :]
    y_ptr += ((b * n_tokens + begin + i[None, :]) * H + h) * P + p[:, None]
    if padding:
        tl.store(y_ptr, tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_M), y_ptr.dtype.element_ty), mask=mask)
        return
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_ptr += b * x_batch_stride + row * x_stride + h * P
    C_ptr += b * C_batch_stride + row * C_stride + g * N
    CB_ptr += ((slot * G + g) * L + i[None, :]) * L
    states_ptr += (slot * H + h) * (P * N)
    chunk = ((b * H + h) * n_chunks + slot % n_chunks) * L
    dt_ptr += chunk
    dA_cumsum_ptr += chunk

    a = tl.load(dA_cumsum_ptr + i, mask=in_rows, other=0.0)
    y = tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_M), tl.float32)
    for n0 in tl.static_range(0, N, BLOCK_SIZE_DSTATE):
        n = n0 + tl.arange(0, BLOCK_SIZE_DSTATE)
        in_dstate = n < N
        S = tl.load(states_ptr + p[:, None] * N + n[None, :], mask=in_headdim[:, None] & in_dstate[None, :], other=0.0)
        Ct = tl.load(C_ptr + i[None, :] * C_stride + n[:, None], mask=in_dstate[:, None] & in_rows[None, :], other=0.0)
        y = tl.dot(S.to(dtype), Ct, y, input_precision=PRECISION)
    y *= exp(a)[None, :]

    end = tl.minimum(i0 + BLOCK_SIZE_M, length)
    for j0 in tl.range(0, end, BLOCK_SIZE_K, num_stages=STAGES if dtype != tl.float32 else 1):
        j = j0 + tl.arange(0, BLOCK_SIZE_K)
        live = j < end
        xt = tl.load(x_ptr + j[None, :] * x_stride + p[:, None], mask=in_headdim[:, None] & live[None, :], other=0.0)
        CBt = tl.load(CB_ptr + j[:, None])
        aj = tl.load(dA_cumsum_ptr + j, mask=live, other=0.0)
        dtj = tl.load(dt_ptr + j, mask=live, other=0.0)
        Mt = CBt * exp(tl.minimum(a[None, :] - aj[:, None], 0.0)) * dtj[:, None]
        # A select: past the diagonal the products were perhaps not even written.
        Mt = tl.where((j[:, None] <= i[None, :]) & live[:, None], Mt, 0.0)
        y = tl.dot(xt, Mt.to(dtype), y, input_precision=PRECISION)

    if D_ptr is not None:
        xt = tl.load(x_ptr + i[None, :] * x_stride + p[:, None], mask=mask, other=0.0).to(tl.float32)
        if D_PER_HEADDIM:
            y += xt * tl.load(D_ptr + h * P + p, mask=in_headdim, other=0.0).to(tl.float32)[:, None]
        else:
            y += xt * tl.load(D_ptr + h).to(tl.float32)
    if z_ptr is not None:
        z_ptr += b * z_batch_stride + h * P
        z = tl.load(z_ptr + (begin + i[None, :]) * z_stride + p[:, None], mask=mask, other=0.0).to(tl.float32)
        y *= silu(z)
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=mask)
