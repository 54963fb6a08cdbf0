"""The gate of the gated delta rule, summed up within each chunk: the log of the decay since the chunk's first token.

Source: flash-linear-attention's operator of this name.
"""

from typing import Any

import torch

from ssm_configs import lookup
from ssm_configs.config import Config
from ssm_configs.contracts import gdn as contract

from .. import _arguments
from .._plans import Cache, Launcher, call_key
from .._replay import replayed
from ._chunk_local_cumsum_kernel import chunk_local_cumsum_kernel
from ._plan import Plan, make_plan


@replayed
def chunk_local_cumsum(
    g: torch.Tensor, *, chunk_size: int = 64, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    """[B,T,H_v] in fp32: g summed in fp32 from each chunk's first token on. Chunks begin at their sequence's first token.

    Args:
        g: [B,T,H_v], tokens any distance apart; float32, bfloat16 or float16.
        chunk_size: 16, 32 or 64.
        cu_seqlens: [N_seq+1], int32 or int64, the bounds of packed sequences; then B = 1. They may repeat, and rows at or
            past cu_seqlens[-1] are zero.

    Raises:
        ValueError, TypeError: before anything is launched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (g, cu_seqlens)
    key = call_key(tensors, type(chunk_size), chunk_size)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(tensors, chunk_size)
    dims: Any = plan.dims
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    sums = torch.empty(g.shape, dtype=torch.float32, device=g.device)
    if sums.numel():
        config = lookup("gdn_chunk_local_cumsum", **_request(plan))
        g, cu_seqlens = plan.apply(tensors)
        _launch(plan, dims, config, plan.strides["g"], g, sums, cu_seqlens)
    return sums


_LAUNCH = Launcher(chunk_local_cumsum_kernel)
_PLANS: Cache[Plan] = Cache()


def _launch(key, dims: contract.Dims, config: Config, strides: tuple[int, int], g, sums, cu_seqlens) -> None:
    BLOCK_SIZE_H = config["BLOCK_SIZE_H"]
    # Of all packed tokens the padding may need one slot more. One axis, because the others stop at 65,535.
    grid = ((dims.B * dims.NC + dims.packed) * -(-dims.H_v // BLOCK_SIZE_H), 1, 1)
    _LAUNCH(
        key,
        grid,
        (g, sums, cu_seqlens, dims.T, dims.NC, dims.N_seq, *strides),
        (dims.H_v, dims.L, BLOCK_SIZE_H),
        config["num_warps"],
    )


def _plan(tensors, chunk_size: int) -> Plan:
    return make_plan(
        "gdn.chunk_local_cumsum", contract.CHUNK_LOCAL_CUMSUM, 1, tensors, contract.check_chunk_local_cumsum,
        tokens=("g",), chunk_size=chunk_size,
    )  # fmt: skip


def _request(plan: Plan) -> dict[str, Any]:
    dims: Any = plan.dims
    return plan.request(dims.B * dims.T * dims.H_v, chunk_size=dims.L)


def config_request(g, *, chunk_size=64, cu_seqlens=None) -> dict[str, Any]:
    """What a call with these arguments asks the tuning table for."""
    return _request(_plan((g, cu_seqlens), chunk_size))
