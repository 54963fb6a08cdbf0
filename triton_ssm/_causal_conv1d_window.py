# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The sliding window of the short convolution: the last five inputs and the taps, by lag, in registers.

A window is five vectors p1 … p5, the inputs 1 … 5 tokens back, in the dtype they were stored in, so that what leaves as
state is what came in. Width W uses the first W - 1; the compiler drops the others.
"""

import torch
import triton
import triton.language as tl

from ._numerics import silu


def word_aligned(weight: torch.Tensor) -> torch.Tensor:
    """The weights where `load_taps` can read them: dense, and from a multiple of its words' 8 bytes on."""
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 8 == 0 else weight.clone()


@triton.jit
def load_taps(weight_ptr, bias_ptr, d, mask, W: tl.constexpr):
    """The weights by lag (w0 belongs to the current input) and the bias, in fp32.

    A channel's taps are neighbours in memory. They are loaded as integers as wide as divide them, and taken apart in
    registers: single taps would touch every cache line W times, and a tile [channels, W] would have another layout than
    the inputs, with a conversion through shared memory, or several for each row, to bring them together.
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    BITS: tl.constexpr = dtype.primitive_bitwidth
    WORD: tl.constexpr = 64 if W * BITS % 64 == 0 else 32 if W * BITS % 32 == 0 else 16
    WORDS: tl.constexpr = W * BITS // WORD
    tap: tl.constexpr = tl.int32 if BITS == 32 else tl.int16
    word: tl.constexpr = tl.int64 if WORD == 64 else tl.int32 if WORD == 32 else tl.int16
    words_ptr = weight_ptr.to(tl.pointer_type(word)) + d * WORDS
    taps = ()
    for i in tl.static_range(WORDS):
        bits = tl.load(words_ptr + i, mask=mask, other=0)
        for j in tl.static_range(WORD // BITS):
            taps += ((bits >> (j * BITS)).to(tap).to(dtype, bitcast=True).to(tl.float32),)
    w0, w1 = taps[W - 1], taps[W - 2]
    w2, w3, w4, w5 = w0, w0, w0, w0
    if W > 2:
        w2 = taps[W - 3]
    if W > 3:
        w3 = taps[W - 4]
    if W > 4:
        w4 = taps[W - 5]
    if W > 5:
        w5 = taps[W - 6]
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
