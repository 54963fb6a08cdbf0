"""Philox-4x32-10 and stochastic rounding, as both packages define them.

Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011; the known-answer vectors
in the tests are the ones published with that paper's Random123 library.
"""

import ml_dtypes
import numpy as np

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)


def philox_4x32(counter, key, rounds: int = 10):
    """Four 32-bit words for each counter (c0, c1, c2, c3) under the key (k0, k1); every input is a 32-bit integer."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = (int(word) & 0xFFFFFFFF for word in key)
    for _ in range(rounds):
        product0, product1 = np.uint64(_M0) * c0, np.uint64(_M1) * c2
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return tuple(word.astype(np.uint32) for word in np.broadcast_arrays(c0, c1, c2, c3))


def state_bits(seed: int, slot: int, H: int, P: int, N: int) -> np.ndarray:
    """The 16 random bits of every element of one state slot, [H,P,N] uint16.

    With W = max(1, next_power_of_2(N) / 8) the counter is the 64-bit number ((slot·H + h)·P + p)·W + n mod W; its four
    words serve the elements n mod W, W + n mod W, …: element n takes word (n // W) // 2, low half where n // W is even.
    """
    width = max(1, (1 << (N - 1).bit_length()) // 8)
    rows = (np.uint64(slot) * np.uint64(H) * np.uint64(P) + np.arange(H * P, dtype=np.uint64)).reshape(H, P, 1)
    counter = rows * np.uint64(width) + np.arange(width, dtype=np.uint64)
    words = philox_4x32((counter & _LOW, counter >> np.uint64(32), 0 * counter, 0 * counter), (seed, seed >> 32))
    halves = [half for word in words for half in (word & np.uint32(0xFFFF), word >> np.uint32(16))]
    return np.concatenate(halves, axis=-1)[..., :N].astype(np.uint16)


def stochastic_round(values: np.ndarray, bits: np.ndarray, dtype: str) -> np.ndarray:
    """float32 `values` rounded to `dtype` up with the probability of their distance from the lower neighbour.

    Values beyond the largest finite one, infinities and NaN take the ordinary cast.
    """
    values, bits = np.asarray(values, np.float32), np.asarray(bits, np.uint32)
    raw = values.view(np.uint32)
    magnitude = np.abs(values)
    if dtype == "bfloat16":
        target = np.dtype(ml_dtypes.bfloat16)
        rounded = ((raw + bits) & np.uint32(0xFFFF0000)).view(np.float32)
        largest = np.float32(ml_dtypes.finfo(target).max)
    elif dtype == "float16":
        target = np.dtype(np.float16)
        normal = ((raw + (bits >> np.uint32(3))) & np.uint32(0xFFFFE000)).view(np.float32)
        # Below 2^-14 float16 steps by 2^-24 whatever the exponent, so the dropped bits are counted in that unit.
        with np.errstate(over="ignore", invalid="ignore"):
            steps = np.trunc(magnitude * np.float32(2**24) + bits.astype(np.float32) * np.float32(2**-16))
        subnormal = np.copysign(steps * np.float32(2**-24), values).astype(np.float32)
        rounded = np.where(magnitude < np.float32(2**-14), subnormal, normal)
        largest = np.float32(65504)
    else:
        raise ValueError(f"dtype: got {dtype!r}, expected 'bfloat16' or 'float16'")
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(magnitude <= largest, rounded, values).astype(target)
