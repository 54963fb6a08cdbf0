"""Triton's interpreter, mended where it would get a right kernel wrong.

In Triton 3.6 its products multiply the bits of bfloat16 operands and not their values, and its casts to bfloat16 drop the low
bits where hardware rounds to nearest even. (Other arithmetic in bfloat16 is wrong there, too; kernels here have none.)
"""

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def mend() -> None:
    """Before the first launch. From then on for all kernels of the process, which it makes no less right."""
    convert: Any = getattr(interpreter, "_convert_float", None)
    builder: Any = interpreter.InterpreterBuilder

    def convert_float(data: Any, from_type: Any, to_type: Any, rounding_mode: Any) -> Any:
        to_nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if from_type == tl.float32 and to_type == tl.bfloat16 and to_nearest:
            return to_bfloat16(np.asarray(data, np.float32))
        return convert(data, from_type, to_type, rounding_mode)

    create_dot: Any = getattr(builder, "create_dot", None)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        # What 16 bits hold, fp32 does, and so it does their products.
        return create_dot(self, _as_float32(a), _as_float32(b), *rest)

    # A Triton that has them elsewhere is not the one that this is about.
    if convert is not None and create_dot is not None:
        interpreter._convert_float = convert_float
        builder.create_dot = dot


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, rounded to nearest even."""
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _as_float32(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    values = (np.ascontiguousarray(handle.data).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(values, tl.float32)
