# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `bmm_chunk`: BLOCK_SIZE_M by BLOCK_SIZE_N pairs of tokens of one chunk, BLOCK_SIZE_K of dstate a step.

The loop is not pipelined. In a pipelined one both operands lie in shared memory, so that Triton leaves a product under way
into the next step; where the steps are few and their number is known, ptxas (12.8, sm_90) unrolls them and then drops
the products: all of CB was zero with dstate 256 in four steps. A step of 128 has most models' whole dstate anyway.
"""

import triton
import triton.language as tl

from ._chunks import chunk_in_slot


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "n_sequences", "C_batch_stride", "B_batch_stride"])
def bmm_chunk_kernel(
    C_ptr, B_ptr, CB_ptr, cu_seqlens_ptr,
    n_tokens, n_chunks, n_sequences, C_batch_stride, B_batch_stride, C_stride, B_stride,
    G: tl.constexpr, N: tl.constexpr, L: tl.constexpr, CAUSAL: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    """CAUSAL: tiles in which every token of B comes after every one of C are left unwritten."""
    BLOCKS_M: tl.constexpr = L // BLOCK_SIZE_M
    BLOCKS_N: tl.constexpr = L // BLOCK_SIZE_N
    pid = tl.program_id(0)
    # Offsets are 64-bit: C and the products may have more than 2^31 elements.
    slot = (pid // (BLOCKS_M * BLOCKS_N * G)).to(tl.int64)
    g = (pid // (BLOCKS_M * BLOCKS_N)) % G
    i0 = (pid // BLOCKS_N % BLOCKS_M) * BLOCK_SIZE_M
    j0 = (pid % BLOCKS_N) * BLOCK_SIZE_N
    if CAUSAL:
        if j0 >= i0 + BLOCK_SIZE_M:
            return
    b, _, row, length, padding = chunk_in_slot(cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, L, ALIGNED)
    if padding | (length == 0):
        return
    i, j = i0 + tl.arange(0, BLOCK_SIZE_M), j0 + tl.arange(0, BLOCK_SIZE_N)
    C_ptr += b * C_batch_stride + row * C_stride + g * N
    B_ptr += b * B_batch_stride + row * B_stride + g * N

    products = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.float32)
    for k0 in tl.range(0, N, BLOCK_SIZE_K, num_stages=1):
        k = k0 + tl.arange(0, BLOCK_SIZE_K)
        C = tl.load(
            C_ptr + i[:, None] * C_stride + k[None, :], mask=(i < length)[:, None] & (k < N)[None, :], other=0.0
        )
        Bt = tl.load(
            B_ptr + j[None, :] * B_stride + k[:, None], mask=(k < N)[:, None] & (j < length)[None, :], other=0.0
        )
        products = tl.dot(C, Bt, products, input_precision=PRECISION)
    # A select: NaN times the zero of no token is NaN.
    products = tl.where((i < length)[:, None] & (j < length)[None, :], products, 0.0)
    tl.store(CB_ptr + (slot * G + g) * (L * L) + i[:, None] * L + j[None, :], products)
