"""Copies of so many rows as only the device knows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_SOME = 8


def copy_rows(copy: Callable[[Any, int], None], count: jax.Array) -> None:
    """`copy(first row, rows)` until the first `count` rows are copied: eight at a time, then one.

    TMA cannot mask rows. Each size of a copy but one row's takes a descriptor, and the code by which the host passes them on
    takes 50 ms to compile with one and 700 ms with 18 of them, whatever the kernel is: so two sizes, and not all powers of two.
    """
    eights = lax.div(count, jnp.int32(_SOME))
    lax.fori_loop(jnp.int32(0), eights, lambda i, _: copy(i * _SOME, _SOME), None)
    lax.fori_loop(eights * _SOME, count, lambda i, _: copy(i, 1), None)
