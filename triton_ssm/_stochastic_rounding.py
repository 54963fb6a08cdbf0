# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""Stochastic rounding of a state tile to 16 bits, the same bits as in `pallas_ssm`.

The random bits are a function of the seed and of the element's place in the pool alone, never of the launch: Philox-4x32-10
(Salmon et al., SC 2011) with counter row·W + n mod W, where row = (slot·H + h)·P + p and W = BLOCK_SIZE_N / 8. One counter
gives four words and so 16 bits for each of eight elements, n mod W, W + n mod W, …: a block of W columns a half word.
"""

import triton
import triton.language as tl


@triton.jit
def random_bits(seed_ptr, rows, BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr):
    """[BLOCK_SIZE_M, BLOCK_SIZE_N] uint32, of which the low 16 bits are random; `rows` is [BLOCK_SIZE_M] int64."""
    WIDTH: tl.constexpr = BLOCK_SIZE_N // 8
    counter = rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), low, high, zero, zero)
    # [M, W, half, word low bit, word high bit] -> [M, word high bit, word low bit, half, W] -> [M, N]
    words01 = tl.join(tl.join(w0 & 0xFFFF, w0 >> 16), tl.join(w1 & 0xFFFF, w1 >> 16))
    words23 = tl.join(tl.join(w2 & 0xFFFF, w2 >> 16), tl.join(w3 & 0xFFFF, w3 >> 16))
    blocks = tl.permute(tl.join(words01, words23), (0, 4, 3, 2, 1))
    return tl.reshape(blocks, (BLOCK_SIZE_M, BLOCK_SIZE_N))


@triton.jit
def stochastic_round(value, bits, dtype: tl.constexpr):
    """`value` (fp32) to bf16 or fp16, upwards with the probability of its distance from the lower neighbour.

    What lies beyond the largest finite value, infinities and NaN take the ordinary cast.
    """
    raw = value.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        rounded = ((raw + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
        largest = 3.3895313892515355e38
    else:
        normal = ((raw + (bits >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Below 2^-14 fp16 steps by 2^-24 whatever the exponent, so the dropped bits are counted in that unit.
        small = tl.minimum(tl.abs(value), 0.00006103515625)
        steps = (small * 16777216.0 + bits.to(tl.float32) * 0.0000152587890625).to(tl.int32).to(tl.float32)
        magnitude = (steps * 5.9604644775390625e-08).to(tl.uint32, bitcast=True)
        subnormal = (magnitude | (raw & 0x80000000)).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(value) < 0.00006103515625, subnormal, normal)
        largest = 65504.0
    return tl.where(tl.abs(value) <= largest, rounded, value).to(dtype)
