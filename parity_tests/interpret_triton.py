"""Mends Triton 3.6's interpreter where it would fail a right kernel. Import before the first launch; tests only.

Its cast from fp32 to bf16 drops the low bits where hardware rounds to nearest even. (Its bf16 arithmetic is wrong too;
kernels here use bf16 as storage alone.)
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
