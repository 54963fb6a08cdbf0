"""How the tokens of a chunk stand in each other's way: the strictly lower triangle whose inverse the delta rule needs.

    A[i, j] = beta[i]·(k[i]·k[j])·exp(g[i] - g[j])          j < i, within a chunk

k·k^T is multiplied in k's dtype and accumulated in fp32; all else is fp32.

Source: flash-linear-attention's operator of this name; Yang, Kautz and Hatamizadeh, Gated Delta Networks (2024).
"""

from typing import Any

import torch

from ssm_configs import lookup
from ssm_configs.config import Config
from ssm_configs.contracts import gdn as contract

from .. import _arguments
from .._plans import Cache, Launcher, call_key
from .._replay import replayed
from ._chunk_scaled_dot_kkt_kernel import chunk_scaled_dot_kkt_kernel
from ._plan import Plan, block, make_plan


@replayed
def chunk_scaled_dot_kkt(
    k: torch.Tensor,
    beta: torch.Tensor,
    *,
    g: torch.Tensor | None = None,
    chunk_size: int = 64,
    cu_seqlens: torch.Tensor | None = None,
    precision: str = "ieee",
) -> torch.Tensor:
    """A [B,T,H_v,BT] in fp32, BT = chunk_size: row i of a chunk, column j; zero where j >= i.

    Sizes: H_k key heads, H_v value heads, a multiple of H_k: value head h reads key head h // (H_v // H_k).

    Args:
        k: [B,T,H_k,K], tokens any distance apart; float32, bfloat16 or float16; K up to 256.
        beta: [B,T,H_v], likewise, in any of these dtypes.
        g: [B,T,H_v] in fp32, of `chunk_local_cumsum`, of either sign; None for no decay.
        chunk_size: 16, 32 or 64.
        cu_seqlens: [N_seq+1], int32 or int64, the bounds of packed sequences; then B = 1. They may repeat, and rows at or
            past cu_seqlens[-1] are zero.
        precision: "ieee" or "tf32", how fp32 keys are multiplied.

    Raises:
        ValueError, TypeError: before anything is launched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (k, beta, g, cu_seqlens)
    contract.check_precision(precision)
    key = call_key(tensors, type(chunk_size), chunk_size)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(tensors, chunk_size)
    dims: Any = plan.dims
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    A = torch.empty(dims.B, dims.T, dims.H_v, dims.L, dtype=torch.float32, device=k.device)
    if A.numel():
        config = lookup("gdn_chunk_scaled_dot_kkt", **_request(plan))
        k, beta, g, cu_seqlens = plan.apply(tensors)
        _launch(plan, dims, config, plan.strides, precision, k, beta, g, cu_seqlens, A)
    return A


_LAUNCH = Launcher(chunk_scaled_dot_kkt_kernel)
_PLANS: Cache[Plan] = Cache()


def _launch(key, dims: contract.Dims, config: Config, strides, precision: str, k, beta, g, cu_seqlens, A) -> None:
    (k_batch, k_token), (beta_batch, beta_token) = strides["k"], strides["beta"]
    # Of all packed tokens the padding may need one slot more. One axis, because the others stop at 65,535.
    grid = ((dims.B * dims.NC + dims.packed) * dims.H_k, 1, 1)
    _LAUNCH(
        key,
        grid,
        (k, beta, g, A, cu_seqlens, dims.T, dims.NC, dims.N_seq, k_batch, beta_batch, k_token, beta_token),
        (dims.H_k, dims.H_v, dims.K, dims.L, precision, block(config["BLOCK_SIZE_K"], dims.K)),
        config["num_warps"],
    )


def _plan(tensors, chunk_size: int) -> Plan:
    return make_plan(
        "gdn.chunk_scaled_dot_kkt", contract.CHUNK_SCALED_DOT_KKT, 2, tensors, contract.check_chunk_scaled_dot_kkt,
        tokens=("k", "beta"), chunk_size=chunk_size,
    )  # fmt: skip


def _request(plan: Plan) -> dict[str, Any]:
    dims: Any = plan.dims
    return plan.request(dims.B * dims.T * dims.H_v, K=dims.K, chunk_size=dims.L)


def config_request(k, beta, *, g=None, chunk_size=64, cu_seqlens=None, precision="ieee") -> dict[str, Any]:
    """What a call with these arguments asks the tuning table for."""
    contract.check_precision(precision)
    return _request(_plan((k, beta, g, cu_seqlens), chunk_size))
