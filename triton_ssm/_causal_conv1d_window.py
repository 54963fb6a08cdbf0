# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The sliding window of the short convolution: the last five inputs and the taps, by lag, in registers.

A window is five vectors p1 … p5, the inputs 1 … 5 tokens back, in the dtype they were stored in, so that what leaves as
state is what came in. Width W uses the first W - 1; the compiler drops the others.
"""

import triton
import triton.language as tl

from ._numerics import silu


@triton.jit
def load_taps(weight_ptr, bias_ptr, d, mask, W: tl.constexpr):
    """The weights by lag (w0 belongs to the current input) and the bias, in fp32.

    A channel's taps are neighbours in memory, so they are loaded as one tile and split in registers: loads of one tap each
    would touch every cache line W times.
    """
    COLUMNS: tl.constexpr = 2 if W == 2 else 4 if W <= 4 else 8
    j = tl.arange(0, COLUMNS)
    tile = tl.load(weight_ptr + d[:, None] * W + j[None, :], mask=mask[:, None] & (j < W)[None, :], other=0.0)
    tile = tile.to(tl.float32)
    if COLUMNS == 2:
        w1, w0 = tl.split(tile)
        w2, w3, w4, w5 = w0, w0, w0, w0
    elif COLUMNS == 4:
        even, odd = tl.split(tl.reshape(tile, (tile.shape[0], 2, 2)))
        j0, j2 = tl.split(even)
        j1, j3 = tl.split(odd)
        if W == 3:
            w2, w1, w0, w3 = j0, j1, j2, j0
        else:
            w3, w2, w1, w0 = j0, j1, j2, j3
        w4, w5 = w0, w0
    else:
        even, odd = tl.split(tl.reshape(tile, (tile.shape[0], 2, 2, 2)))
        j04, j26 = tl.split(even)
        j15, j37 = tl.split(odd)
        j0, j4 = tl.split(j04)
        j1, j5 = tl.split(j15)
        j2, _j6 = tl.split(j26)
        j3, _j7 = tl.split(j37)
        if W == 5:
            w4, w3, w2, w1, w0, w5 = j0, j1, j2, j3, j4, j0
        else:
            w5, w4, w3, w2, w1, w0 = j0, j1, j2, j3, j4, j5
    bias = tl.zeros_like(w0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    return w0, w1, w2, w3, w4, w5, bias


@triton.jit
def convolve(x, p1, p2, p3, p4, p5, w0, w1, w2, w3, w4, w5, bias, W: tl.constexpr, SILU: tl.constexpr):
    """One output from the current input and the window, oldest tap first, in fp32."""
    y = bias
    if W > 5:
        y += w5 * p5.to(tl.float32)
    if W > 4:
        y += w4 * p4.to(tl.float32)
    if W > 3:
        y += w3 * p3.to(tl.float32)
    if W > 2:
        y += w2 * p2.to(tl.float32)
    y += w1 * p1.to(tl.float32)
    y += w0 * x.to(tl.float32)
    return silu(y) if SILU else y
