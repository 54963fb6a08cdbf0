# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""What pairs of tokens of one chunk get: products of keys or of queries and keys, times a decay. Masked before the exp."""

import triton
import triton.language as tl

from .._numerics import exp


@triton.jit
def load_gate(g_ptr, token, live, H_V: tl.constexpr):
    """The cumulated gate of `token`s, 0 where none is live; `g_ptr` at batch row and head."""
    return tl.load(g_ptr + token * H_V, mask=live, other=0.0)


@triton.jit
def decayed(products, gi, gj, pairs, HAS_GATE: tl.constexpr):
    """products · exp(gi - gj) where `pairs`, else 0; gi and gj broadcast along the axis that is not theirs.

    A gate may be of either sign, so the exponent of a pair that does not count may be beyond all bounds. And a select after,
    for what stands there may be infinite as it is.
    """
    if HAS_GATE:
        products *= exp(tl.where(pairs, gi - gj, 0.0))
    return tl.where(pairs, products, 0.0)
