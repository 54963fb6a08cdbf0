# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""Device functions that every kernel shares, with the rounding that both packages promise."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(value):
    return tl.exp2(value * LOG2E)


@triton.jit
def softplus(value):
    """max(v, 0) + log1p(exp(-|v|)), with log1p(e) = 2·artanh(s), s = e/(2 + e), by its series.

    log(1 + e) loses the low bits of e, and a hardware logarithm near 1 most of them, while a very negative dt is where small
    steps come from. s is at most 1/3, so seven terms leave nothing that fp32 could hold.
    """
    e = exp(-tl.abs(value))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13))))))
    return tl.maximum(value, 0.0) + 2.0 * s * series


@triton.jit
def silu(value):
    return value / (1.0 + exp(-value))
