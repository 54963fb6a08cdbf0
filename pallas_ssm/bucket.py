"""Sizes to pad to, so that few programs serve every size."""

TILE = 64
"""Tokens that a prefill kernel takes at a time: fewer cost as much, and need no program of their own."""


def bucket(n: int, smallest: int = 16) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, … (powers of two and the halves between) that is at least n and `smallest`.

    JAX compiles for each shape. Padding a batch or a token count to its bucket costs at most half as much again (a third
    on the way to a power of two), and a program serves all that fit.

    Args:
        n: sequences, or tokens.
        smallest: a power of two from 16 on. For the tokens of a prefill 64 spares programs at no cost: `warmup` compiles none
            below.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an int, got {type(n).__name__}")
    if n < 0:
        raise ValueError(f"n: expected n >= 0, got {n}")
    if isinstance(smallest, bool) or not isinstance(smallest, int):
        raise TypeError(f"smallest: expected an int, got {type(smallest).__name__}")
    if smallest < 16 or smallest & (smallest - 1):
        raise ValueError(f"smallest: expected a power of two from 16 on, got {smallest}")
    power = max(smallest, 1 << (n - 1).bit_length()) if n else smallest
    between = power // 4 * 3
    return between if smallest < between and n <= between else power
