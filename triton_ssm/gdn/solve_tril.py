"""(I + A)^-1 of each chunk's strictly lower triangle: what every token of a chunk owes to those before it, all at once.

fp32 throughout, by forward substitution over blocks; rounded once, to `out_dtype`.

Source: flash-linear-attention's operator of this name.
"""

from typing import Any

import torch

from ssm_configs import lookup
from ssm_configs.config import Config
from ssm_configs.contracts import gdn as contract

from .. import _arguments
from .._plans import Cache, Launcher, call_key
from ._plan import Plan, make_plan
from ._solve_tril_kernel import solve_tril_kernel

_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    arguments = (A, inverse, cu_seqlens, dims.T, dims.NC, dims.N_seq)
    _LAUNCH(key, grid, arguments, (dims.H_v, dims.L), config["num_warps"])


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
