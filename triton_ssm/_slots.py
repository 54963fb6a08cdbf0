# pyright: basic
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""Which numbers are slots of a pool, for every kernel that has one."""

import triton
import triton.language as tl  # noqa: F401 - the interpreter asks every jitted function's module for it


@triton.jit
def is_slot(slot, null_slot, n_slots):
    """Neither padding nor beyond the pool."""
    return (slot >= 0) & (slot != null_slot) & (slot < n_slots)
