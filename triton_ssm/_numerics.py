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
    """max(v, 0) + log1p(exp(-|v|)), with log1p(e) = log(u)·e/(u - 1), u = 1 + e.

    log(1 + e) alone loses every bit of e below 2^-24, and a very negative dt is where small steps come from. The
    quotient puts the lost bits back (Kahan, HP-15C Advanced Functions Handbook).
    """
    e = exp(-tl.abs(value))
    u = 1.0 + e
    # The divisor is kept off zero also where the quotient is not used.
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(value, 0.0) + log1p


@triton.jit
def silu(value):
    return value / (1.0 + exp(-value))
