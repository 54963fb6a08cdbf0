"""`mamba_chunk_scan_combined` as its five stages' Mosaic GPU kernels, one after another, where the fused path is not taken."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from ssm_configs.contracts import ssd as contract

from .. import layouts
from .._selective_state_update_launch import Unsupported
from . import (
    _bmm_chunk_kernel,
    _chunk_cumsum_kernel,
    _chunk_scan_kernel,
    _chunk_state_kernel,
    _state_passing_kernel,
)
from . import _call as stage
from ._combined_call import Floats, Integers, Results, Static
from ._tiles import ROWS

OP = "mamba_chunk_scan_combined"
# Tokens of a chunk, whatever the caller's are: shorter ones make more states, longer ones larger products of tokens.
CHUNK = 128


@dataclass(frozen=True)
class Launch:
    """Every kernel's blocks follow from the shape alone."""

    chunk_size: int


def plan(static: Static) -> Launch:
    """`Unsupported` where one of the kernels does not take the call."""
    if static.return_intermediate_states:
        raise Unsupported(f"{OP}: the stages' mosaic_gpu kernels return no intermediate states")
    launch = Launch(ROWS if static.dims.T <= ROWS else CHUNK)
    inner = _inner(static, launch)
    reasons = (
        _chunk_cumsum_kernel.unsupported(inner),
        _chunk_state_kernel.unsupported(inner, static.dtype),
        _state_passing_kernel.unsupported(inner),
        _bmm_chunk_kernel.unsupported(inner, static.dtype),
        _chunk_scan_kernel.unsupported(inner, static.dtype),
    )
    for reason in reasons:
        if reason is not None:
            raise Unsupported(f"{OP}: a stage's mosaic_gpu kernel {reason}")
    return launch


def run(static: Static, launch: Launch, floats: Floats, integers: Integers) -> Results:
    dims, cu_seqlens = static.dims, integers.cu_seqlens
    inner = _inner(static, launch)

    def as_tokens(tensor: jax.Array) -> jax.Array:
        if not static.chunk_aligned:
            return tensor
        return layouts.from_chunk_aligned(tensor, chunk_size=dims.L, tokens=dims.T, cu_seqlens=cu_seqlens)

    x, B, C = (as_tokens(tensor) for tensor in (floats.x, floats.B, floats.C))
    a, dt = _chunk_cumsum_kernel.run(inner, floats.dt, floats.A, floats.dt_bias, cu_seqlens)
    states = _chunk_state_kernel.run(inner, x, B, dt, a, cu_seqlens)
    # The next kernels multiply by the state in the inputs' dtype.
    before, final = _state_passing_kernel.run(
        replace(inner, state_dtype=static.dtype), states, a, floats.initial_states, cu_seqlens, jnp.float32
    )
    CB = _bmm_chunk_kernel.run(inner, C, B, cu_seqlens)
    y = _chunk_scan_kernel.run(inner, CB, x, dt, a, C, before, floats.D, floats.z, cu_seqlens)
    return Results(y, final.astype(static.state_dtype) if static.return_final_states else None, None)


def _inner(static: Static, launch: Launch) -> stage.Static:
    dims, L = static.dims, launch.chunk_size
    dims = replace(dims, L=L, NC=contract.chunks(dims.T, L, dims.N_seq, dims.packed), rows=dims.T)
    return stage.Static("", dims, static.dtype, static.precision, static.dt_softplus, static.dt_limit)
