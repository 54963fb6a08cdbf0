"""(I + A)^-1 of each chunk's strictly lower triangle: what every token of a chunk owes to those before it, all at once.

fp32 throughout, by forward substitution over blocks; rounded once, to `out_dtype`.

A can be read by the tensor memory accelerator, which gives the same bits: where the tuning table says `use_tma`, or the
environment FLA_USE_TMA=1 as for the peer, and the tensor's own device has one (NVIDIA, compute capability 9.0 and up).

Source: flash-linear-attention's operator of this name.
"""

import os
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ssm_configs import lookup
from ssm_configs.config import Config
from ssm_configs.contracts import gdn as contract

from .. import _arguments
from .._device import tuning_device
from .._plans import Cache, Launcher, call_key
from .._replay import replayed
from ._plan import Plan, make_plan
from ._solve_tril_kernel import solve_tril_kernel

_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@replayed
def solve_tril(
    A: torch.Tensor, *, cu_seqlens: torch.Tensor | None = None, out_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[B,T,H_v,BT] in `out_dtype`: row i of its chunk's inverse.

    Args:
        A: [B,T,H_v,BT] in fp32, of `chunk_scaled_dot_kkt`; BT, the chunk size, is 16, 32 or 64. What stands on the diagonal
            and above it is not read.
        cu_seqlens: [N_seq+1], int32 or int64, the bounds of packed sequences; then B = 1. They may repeat, and rows at or
            past cu_seqlens[-1] are zero.
        out_dtype: float32, bfloat16 or float16.

    Raises:
        ValueError, TypeError: before anything is launched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (A, cu_seqlens)
    if out_dtype not in _OUT_DTYPES:
        raise TypeError(f"out_dtype: expected torch.float32, torch.bfloat16 or torch.float16, got {out_dtype!r}")
    key = call_key(tensors)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(tensors)
    dims: Any = plan.dims
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    inverse = torch.empty(A.shape, dtype=out_dtype, device=A.device)
    if inverse.numel():
        config = lookup("gdn_solve_tril", **_request(plan))
        A, cu_seqlens = plan.apply(tensors)
        # The plan knows the dtypes of what comes in.
        _launch((plan, out_dtype), dims, config, A, cu_seqlens, inverse)
    return inverse


_LAUNCH = Launcher(solve_tril_kernel)
_PLANS: Cache[Plan] = Cache()


def _launch(key, dims: contract.Dims, config: Config, A, cu_seqlens, inverse) -> None:
    # Of all packed tokens the padding may need one slot more. One axis, because the others stop at 65,535.
    grid = ((dims.B * dims.NC + dims.packed) * dims.H_v, 1, 1)
    # Both are the same to the kernel's plan, and not to its compiled forms.
    descriptor = _descriptor(A, dims) if config["use_tma"] or os.environ.get(_SWITCH) == "1" else None
    pointer = A if descriptor is None else None
    arguments = (inverse, pointer, descriptor, cu_seqlens, dims.T, dims.NC, dims.N_seq)
    _LAUNCH((key, descriptor is None), grid, arguments, (dims.H_v, dims.L), config["num_warps"])


_SWITCH = "FLA_USE_TMA"


def _descriptor(A: torch.Tensor, dims: contract.Dims) -> TensorDescriptor | None:
    """A chunk's rows of one head as a tile; None where there is no accelerator, or A is not for it."""
    capability = tuning_device(A.device).capability
    rows, columns = dims.B * dims.T, dims.H_v * dims.L
    if capability is None or capability < (9, 0) or A.data_ptr() % 16 or rows > _MAX_ROWS:
        return None
    return TensorDescriptor(A, [rows, columns], [columns, 1], [dims.L, dims.L])


# A tile's place is 32-bit, and the last one may reach over the end.
_MAX_ROWS = 2**31 - 64


def _plan(tensors) -> Plan:
    return make_plan("gdn.solve_tril", contract.SOLVE_TRIL, 1, tensors, contract.check_solve_tril)


def _request(plan: Plan) -> dict[str, Any]:
    dims: Any = plan.dims
    return plan.request(dims.B * dims.T * dims.H_v, chunk_size=dims.L)


def config_request(A, *, cu_seqlens=None, out_dtype=torch.float32) -> dict[str, Any]:
    """What a call with these arguments asks the tuning table for."""
    if out_dtype not in _OUT_DTYPES:
        raise TypeError(f"out_dtype: expected torch.float32, torch.bfloat16 or torch.float16, got {out_dtype!r}")
    return _request(_plan((A, cu_seqlens)))
