"""The Mosaic GPU kernels of the five stages: whether one takes a call, and running it."""

from dataclasses import dataclass
from typing import Any

import jax

from .._selective_state_update_launch import Unsupported
from . import (
    _bmm_chunk_kernel,
    _chunk_cumsum_kernel,
    _chunk_scan_kernel,
    _chunk_state_kernel,
    _state_passing_kernel,
)
from ._call import Static

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Launch:
    """Their blocks follow from the shape alone."""

    kernel: str


def plan(static: Static) -> Launch:
    """`Unsupported` where the kernel does not take the call."""
    if static.op == "chunk_cumsum":
        reason = _chunk_cumsum_kernel.unsupported(static)
    elif static.op == "state_passing":
        reason = _state_passing_kernel.unsupported(static)
    elif static.op == "bmm_chunk":
        reason = _bmm_chunk_kernel.unsupported(static, static.dtype)
    elif static.op == "chunk_state":
        reason = _chunk_state_kernel.unsupported(static, static.dtype)
    else:
        reason = _chunk_scan_kernel.unsupported(static, static.dtype)
    if reason is not None:
        raise Unsupported(f"ssd.{static.op}: the mosaic_gpu kernel {reason}")
    return Launch(f"ssd_{static.op}")


def run(static: Static, floats: Arrays, cu_seqlens: jax.Array | None) -> Any:
    """What the public function returns; slots without a chunk hold whatever was there."""
    get = floats.get
    if static.op == "chunk_cumsum":
        return _chunk_cumsum_kernel.run(static, floats["dt"], floats["A"], get("dt_bias"), cu_seqlens)
    if static.op == "state_passing":
        arrays = floats["states"], floats["dA_cumsum"], get("initial_states")
        return _state_passing_kernel.run(static, *arrays, cu_seqlens)
    if static.op == "bmm_chunk":
        return _bmm_chunk_kernel.run(static, floats["C"], floats["B"], cu_seqlens)
    if static.op == "chunk_state":
        arrays = (floats[name] for name in ("x", "B", "dt", "dA_cumsum"))
        return _chunk_state_kernel.run(static, *arrays, cu_seqlens)
    arrays = (floats[name] for name in ("CB", "x", "dt", "dA_cumsum", "C", "states"))
    return _chunk_scan_kernel.run(static, *arrays, get("D"), get("z"), cu_seqlens)
