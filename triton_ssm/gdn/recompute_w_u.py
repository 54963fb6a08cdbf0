"""What a chunk's tokens take from the state and what they bring to it, once those before them have had their turn.

    w = X·(beta·exp(g)·k)          u = X·(beta·v)          within a chunk, X the inverse of `solve_tril`

X is rounded to k's dtype and each factor in parentheses, computed in fp32, to k's or v's; products are accumulated in fp32 and
rounded once.

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
from ._plan import Plan, block, make_plan
from ._recompute_w_u_kernel import recompute_w_u_kernel


@replayed
def recompute_w_u(
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    A: torch.Tensor,
    *,
    g: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(w [B,T,H_v,K], u [B,T,H_v,V]) in k's dtype.

    Sizes: as in `chunk_scaled_dot_kkt`.

    Args:
        k: [B,T,H_k,K], tokens any distance apart; float32, bfloat16 or float16; K up to 256.
        v: [B,T,H_v,V], likewise, in k's dtype.
        beta: [B,T,H_v], likewise, in any of these dtypes.
        A: [B,T,H_v,BT], the inverse, in any of these dtypes; BT, the chunk size, is 16, 32 or 64.
        g: [B,T,H_v] in fp32, of `chunk_local_cumsum`, of either sign; None for no decay.
        cu_seqlens: [N_seq+1], int32 or int64, the bounds of packed sequences; then B = 1. They may repeat, and rows at or
            past cu_seqlens[-1] are zero.
        precision: "ieee" or "tf32", how fp32 inputs are multiplied.

    Raises:
        ValueError, TypeError: before anything is launched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (k, v, beta, A, g, cu_seqlens)
    contract.check_precision(precision)
    key = call_key(tensors)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(tensors)
    dims: Any = plan.dims
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    w = torch.empty(dims.B, dims.T, dims.H_v, dims.K, dtype=k.dtype, device=k.device)
    u = torch.empty(dims.B, dims.T, dims.H_v, dims.V, dtype=v.dtype, device=v.device)
    if dims.B * dims.T:
        config = lookup("gdn_recompute_w_u", **_request(plan))
        k, v, beta, A, g, cu_seqlens = plan.apply(tensors)
        launch(plan, dims, config, plan.strides, True, precision, k, v, beta, A, g, cu_seqlens, w, u)
    return w, u


_LAUNCH = Launcher(recompute_w_u_kernel)
_PLANS: Cache[Plan] = Cache()


def launch(
    key, dims: contract.Dims, config: Config, strides: dict[str, tuple[int, int]], zero_padding: bool, precision: str,
    k, v, beta, A, g, cu_seqlens, w, u,
) -> None:  # fmt: skip
    """`strides`: those of k, v and beta, batch row and token. `zero_padding`: rows that hold no token are written."""
    batch, token = zip(*(strides[name] for name in ("k", "v", "beta")), strict=True)
    # Of all packed tokens the padding may need one slot more. One axis, because the others stop at 65,535.
    grid = ((dims.B * dims.NC + dims.packed) * dims.H_v, 1, 1)
    _LAUNCH(
        key,
        grid,
        (k, v, beta, A, g, w, u, cu_seqlens, dims.T, dims.NC, dims.N_seq, *batch, *token),
        (
            dims.H_k, dims.H_v, dims.K, dims.V, dims.L, zero_padding, precision,
            block(config["BLOCK_SIZE_K"], dims.K), block(config["BLOCK_SIZE_V"], dims.V),
        ),
        config["num_warps"],
    )  # fmt: skip


def _plan(tensors) -> Plan:
    return make_plan(
        "gdn.recompute_w_u", contract.RECOMPUTE_W_U, 4, tensors, contract.check_recompute_w_u, tokens=("k", "v", "beta")
    )  # fmt: skip


def _request(plan: Plan) -> dict[str, Any]:
    return request(plan, plan.dims)


def request(plan: Plan, dims: Any) -> dict[str, Any]:
    return plan.request(dims.B * dims.T * dims.H_v, K=dims.K, V=dims.V, chunk_size=dims.L)


def config_request(k, v, beta, A, *, g=None, cu_seqlens=None, precision="ieee") -> dict[str, Any]:
    """What a call with these arguments asks the tuning table for."""
    contract.check_precision(precision)
    return _request(_plan((k, v, beta, A, g, cu_seqlens)))
