"""Sizes to pad to, so that few programs serve every size."""


def bucket(n: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, … (powers of two and the halves between) that is at least n.

    JAX compiles for each shape. Padding a batch or a token count to its bucket costs at most half as much again (a third
    on the way to a power of two), and a program serves all that fit.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an int, got {type(n).__name__}")
    if n < 0:
        raise ValueError(f"n: expected n >= 0, got {n}")
    power = max(16, 1 << (n - 1).bit_length()) if n else 16
    between = power // 4 * 3
    return between if 16 < between and n <= between else power
