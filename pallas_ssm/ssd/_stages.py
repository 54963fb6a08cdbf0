"""The Mosaic GPU kernels of the five stages: whether one takes a call, and running it."""

from dataclasses import dataclass
from types import SimpleNamespace
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
    f: Any = SimpleNamespace(**dict.fromkeys(("dt_bias", "initial_states", "D", "z")) | floats)
    if static.op == "chunk_cumsum":
        return _chunk_cumsum_kernel.run(static, f.dt, f.A, f.dt_bias, cu_seqlens)
    if static.op == "chunk_state":
        return _chunk_state_kernel.run(static, f.x, f.B, f.dt, f.dA_cumsum, cu_seqlens)
    if static.op == "state_passing":
        return _state_passing_kernel.run(static, f.states, f.dA_cumsum, f.initial_states, cu_seqlens)
    if static.op == "bmm_chunk":
        return _bmm_chunk_kernel.run(static, f.C, f.B, cu_seqlens)
    return _chunk_scan_kernel.run(static, f.CB, f.x, f.dt, f.dA_cumsum, f.C, f.states, f.D, f.z, cu_seqlens)
