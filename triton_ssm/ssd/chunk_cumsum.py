"""The first stage of the chunked SSD scan: every chunk's steps, and the log of its decay up to each token.

    dt[t] = clip(softplus(dt[t] + dt_bias), dt_limit)          dA_cumsum[t] = Σ_{s <= t} dt[s]·A      within a chunk

softplus and bias where asked for, all in fp32. Past a chunk's last token dt is 0, so that its last entry is its total.

Source: mamba_ssm's operators of these names; Dao and Gu, Transformers are SSMs (2024).
"""

from typing import Any

import torch

from ssm_configs import lookup
from ssm_configs.config import Config
from ssm_configs.contracts import ssd as contract

from .. import _arguments
from .._plans import Cache, Launcher, call_key
from .._replay import replayed
from ._chunk_cumsum_kernel import chunk_cumsum_kernel
from ._plan import Plan, make_plan


@replayed
def chunk_cumsum(
    dt: torch.Tensor,
    A: torch.Tensor,
    *,
    chunk_size: int,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dA_cumsum, dt), each [B,H,NC,L] in fp32.

    Sizes: B batch rows, T tokens, H heads, L chunk_size, NC chunks of a batch row: ceil(T / L). Packed, sequence n's chunk c is
    in slot cu_seqlens[n] // L + n + c of NC = T // L + N_seq, and slots in which no chunk stands are not written.
    Float tensors are float32, bfloat16 or float16, each on its own; cu_seqlens is int32 or int64.

    Args:
        dt: [B,T,H], tokens any distance apart.
        A: [H]; negative.
        chunk_size: a power of two from 16 to 2048.
        dt_bias: [H].
        dt_softplus: softplus after the bias. It keeps the low bits of very negative steps.
        dt_limit: (low, high), 0 <= low <= high: the range that dt is clipped to at the end.
        cu_seqlens: [N_seq+1], the bounds of packed sequences; then B = 1. They may repeat.

    Raises:
        ValueError, TypeError: before anything is launched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (dt, A, dt_bias, cu_seqlens)
    contract.check_flag("dt_softplus", dt_softplus)
    dt_limit = contract.check_dt_limit(dt_limit)
    key = call_key(tensors, contract.check_chunk_size(chunk_size))
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(tensors, chunk_size)
    dims = plan.dims
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    shape = (dims.B, dims.H, dims.NC, dims.L)
    dA_cumsum, step = (torch.empty(shape, dtype=torch.float32, device=dt.device) for _ in range(2))
    if dA_cumsum.numel():
        config = lookup("ssd_chunk_cumsum", **_request(plan))
        dt, A, dt_bias, cu_seqlens = plan.apply(tensors)
        launch(
            plan, dims, config, plan.strides["dt"], dt_softplus, dt_limit, dt, A, dt_bias, dA_cumsum, step, cu_seqlens
        )
    return dA_cumsum, step


_LAUNCH = Launcher(chunk_cumsum_kernel)
_PLANS: Cache[Plan] = Cache()


def launch(
    key, dims: contract.Dims, config: Config, strides: tuple[int, int], dt_softplus: bool, dt_limit: tuple[float, float],
    dt, A, dt_bias, dA_cumsum, step, cu_seqlens,
) -> None:  # fmt: skip
    BLOCK_SIZE_H = config["BLOCK_SIZE_H"]
    grid = (dims.B * dims.NC * -(-dims.H // BLOCK_SIZE_H), 1, 1)
    _LAUNCH(
        key,
        grid,
        (dt, A, dt_bias, dA_cumsum, step, cu_seqlens, dims.T, dims.NC, dims.N_seq, *strides, *dt_limit),
        (dims.H, dims.L, dt_softplus, BLOCK_SIZE_H, min(config["BLOCK_SIZE_T"], dims.L)),
        config["num_warps"],
    )


def _plan(tensors, chunk_size: int) -> Plan:
    return make_plan(
        "ssd.chunk_cumsum", contract.CHUNK_CUMSUM, 2, tensors, contract.check_chunk_cumsum, tokens=("dt",),
        chunk_size=chunk_size,
    )  # fmt: skip


def _request(plan: Plan) -> dict[str, Any]:
    dims = plan.dims
    return plan.request(dims.B * dims.T, nheads=dims.H, chunk_size=dims.L)


def config_request(
    dt, A, *, chunk_size, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf")), cu_seqlens=None
) -> dict[str, Any]:
    """What a call with these arguments asks the tuning table for."""
    contract.check_flag("dt_softplus", dt_softplus)
    contract.check_dt_limit(dt_limit)
    return _request(_plan((dt, A, dt_bias, cu_seqlens), chunk_size))
