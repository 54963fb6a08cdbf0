# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""x·rsqrt(Σ x^2 + 1e-6) along the last axis, for q and k in one launch: BLOCK_SIZE_M tokens of one head a program."""

import triton
import triton.language as tl

_EPS = tl.constexpr(1e-6)


@triton.jit
def unit(x, axis: tl.constexpr):
    """fp32 in, fp32 out, rounded by the caller."""
    return x * tl.rsqrt(tl.expand_dims(tl.sum(x * x, axis=axis), axis) + _EPS)


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@triton.jit(do_not_specialize=["n_tokens", "q_batch_stride", "k_batch_stride"])
def l2norm_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, n_tokens, q_batch_stride, k_batch_stride, q_stride, k_stride,
    H_K: tl.constexpr, K: tl.constexpr, BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_SIZE_K >= K. Programs: q and k, heads, blocks of tokens, batch rows."""
    pid = tl.program_id(0)
    blocks = (n_tokens + BLOCK_SIZE_M - 1) // BLOCK_SIZE_M
    # Offsets are 64-bit: q and k may have more than 2^31 elements.
    b = (pid // (2 * H_K) // blocks).to(tl.int64)
    t = (pid // (2 * H_K) % blocks).to(tl.int64) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    h = pid // 2 % H_K
    d = tl.arange(0, BLOCK_SIZE_K)
    mask = (t < n_tokens)[:, None] & (d < K)[None, :]
    out = ((b * n_tokens + t[:, None]) * H_K + h) * K + d[None, :]
    if pid % 2 == 0:
        x = tl.load(q_ptr + b * q_batch_stride + t[:, None] * q_stride + h * K + d[None, :], mask=mask, other=0.0)
        tl.store(q_out_ptr + out, unit(x.to(tl.float32), 1).to(q_out_ptr.dtype.element_ty), mask=mask)
    else:
        x = tl.load(k_ptr + b * k_batch_stride + t[:, None] * k_stride + h * K + d[None, :], mask=mask, other=0.0)
        tl.store(k_out_ptr + out, unit(x.to(tl.float32), 1).to(k_out_ptr.dtype.element_ty), mask=mask)
