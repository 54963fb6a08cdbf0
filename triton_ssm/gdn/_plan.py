"""What every stage works out once for every kind of call: the plans of `ssd`, whose `dims` are the gated delta rule's here."""

import dataclasses
import math
from typing import Any

from ..ssd import _plan

Plan = Any
block = _plan.block
# Offsets within a chunk of up to 64 tokens are 32-bit in the kernels.
_TOO_FAR = 2**31 // 64


def make_plan(op: str, names: tuple[str, ...], required: int, tensors: Any, check: Any, **options: Any) -> Plan:
    """As in `ssd`; tensors whose tokens lie too far apart are read as copies."""
    plan = _plan.make_plan(op, names, required, tensors, check, **options)
    far = [name for name, (_, token) in plan.strides.items() if token >= _TOO_FAR]
    if not far:
        return plan
    strides = dict(plan.strides)
    for name in far:
        _, T, *row = tensors[names.index(name)].shape
        strides[name] = (T * math.prod(row), math.prod(row))
    return dataclasses.replace(plan, copied=(*plan.copied, *map(names.index, far)), strides=strides)
