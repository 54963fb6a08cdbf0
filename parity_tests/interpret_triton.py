"""Mends Triton 3.6's interpreter where it would fail a right kernel. Import before the first launch; tests only.

Its cast from fp32 to bf16 drops the low bits where hardware rounds to nearest even, and its products multiply the bits of bf16
operands, not their values. (Other bf16 arithmetic is wrong there, too; kernels here have none.)
"""

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_stock_convert_float = interpreter._convert_float


def _convert_float(data, from_type, to_type, rounding_mode):
    to_nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
    if from_type == tl.float32 and to_type == tl.bfloat16 and to_nearest:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(data, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    return _stock_convert_float(data, from_type, to_type, rounding_mode)


interpreter._convert_float = _convert_float


_stock_create_dot = interpreter.InterpreterBuilder.create_dot


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    # What 16 bits hold, fp32 does, and so it does their products.
    return _stock_create_dot(self, _as_float32(a), _as_float32(b), d, input_precision, max_num_imprecise_acc)


def _as_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    values = np.ascontiguousarray(handle.data).view(ml_dtypes.bfloat16).astype(np.float32)
    return interpreter.TensorHandle(values, tl.float32)


interpreter.InterpreterBuilder.create_dot = _create_dot
