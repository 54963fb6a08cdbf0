"""Stochastic rounding of a state to 16 bits, the same bits as in `triton_ssm`.

The random bits are a function of the seed and of the element's place in the pool alone, never of the launch: Philox-4x32-10
(Salmon et al., SC 2011) with counter row·W + n mod W, where row = (slot·H + h)·P + p and W = max(1, next power of two of
N / 8). One counter gives four words and so 16 bits for each of eight elements, n mod W, W + n mod W, …: a block of W
columns a half word. Laid side by side, the half words of a [rows, W] tile of counters are the bits of a [rows, N] tile.
"""

import jax
import jax.numpy as jnp
import numpy as np

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def block_width(N: int) -> int:
    """W: the columns that one half word of a tile of counters serves."""
    return max(1, (1 << (N - 1).bit_length()) // 8)


def _wide_product(factor: int, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(high, low) words of a 32-bit constant times a uint32 array."""
    # 64-bit integers, which JAX has by default switched off: Mosaic GPU lowers no mulhi, but LLVM makes one of this.
    with jax.enable_x64(True):
        product = jax.lax.convert_element_type(value, jnp.uint64) * np.uint64(factor)
        high = jax.lax.convert_element_type(product >> np.uint64(32), jnp.uint32)
    return high, value * np.uint32(factor)


def counter(base: jax.Array, rows_per_base: int, N: int, local: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(high, low) words of (base · rows_per_base · W + local); `local`, uint32, broadcasts against `base`."""
    high, low = _wide_product(rows_per_base * block_width(N), base)
    total = low + local
    return high + (total < local).astype(jnp.uint32), total


def random_bits(key: tuple[jax.Array, jax.Array], high: jax.Array, low: jax.Array, N: int) -> jax.Array:
    """[..., N] uint32, of which the low 16 bits are random, from the counters' words, [..., W]."""
    k0, k1 = key
    c0, c1, c2, c3 = low, high, jnp.zeros_like(low), jnp.zeros_like(low)
    for step in range(_ROUNDS):
        high0, low0 = _wide_product(_MULTIPLIERS[0], c0)
        high1, low1 = _wide_product(_MULTIPLIERS[1], c2)
        step0, step1 = (np.uint32(step * weyl & 0xFFFFFFFF) for weyl in _KEY_STEPS)
        c0, c1, c2, c3 = high1 ^ c1 ^ (k0 + step0), low1, high0 ^ c3 ^ (k1 + step1), low0
    halves = [half for word in (c0, c1, c2, c3) for half in (word & np.uint32(0xFFFF), word >> np.uint32(16))]
    blocks = -(-N // low.shape[-1])
    bits = halves[0] if blocks == 1 else jnp.concatenate(halves[:blocks], axis=-1)
    return bits if bits.shape[-1] == N else bits[..., :N]


def stochastic_round(value: jax.Array, bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`value` (fp32) to bf16 or fp16, upwards with the probability of its distance from the lower neighbour.

    What lies beyond the largest finite value, infinities and NaN take the ordinary cast.
    """
    raw = jax.lax.bitcast_convert_type(value, jnp.uint32)
    magnitude = jnp.abs(value)
    if dtype == jnp.bfloat16:
        rounded = jax.lax.bitcast_convert_type((raw + bits) & np.uint32(0xFFFF0000), jnp.float32)
    else:
        normal = jax.lax.bitcast_convert_type((raw + (bits >> np.uint32(3))) & np.uint32(0xFFFFE000), jnp.float32)
        # Below 2^-14 fp16 steps by 2^-24 whatever the exponent, so the dropped bits are counted in that unit.
        limit = np.float32(2**-14)
        fraction = bits.astype(jnp.float32) * np.float32(2**-16)
        steps = (jnp.minimum(magnitude, limit) * np.float32(2**24) + fraction).astype(jnp.int32).astype(jnp.float32)
        small = jax.lax.bitcast_convert_type(steps * np.float32(2**-24), jnp.uint32) | (raw & np.uint32(0x80000000))
        rounded = jnp.where(magnitude < limit, jax.lax.bitcast_convert_type(small, jnp.float32), normal)
    return jnp.where(magnitude <= np.float32(jnp.finfo(dtype).max), rounded, value).astype(dtype)
