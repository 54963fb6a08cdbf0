"""The one stage of the gated delta rule that goes from chunk to chunk: the state S [K,V] before each, and what it changes.

    v_new = u - w·S          S = exp(g_last)·S + k^T·(exp(g_last - g)·v_new)          chunk after chunk

S is carried in fp32. It is rounded to k's dtype where it is stored and multiplied; v_new is fp32, rounded to u's dtype where it
is stored, and with its decay to k's where it is multiplied. Products are accumulated in fp32.

Source: flash-linear-attention's operator of this kind; Yang, Kautz and Hatamizadeh, Gated Delta Networks (2024).
"""

from typing import Any

import torch

from ssm_configs import lookup
from ssm_configs.config import Config
from ssm_configs.contracts import gdn as contract

from .. import _arguments
from .._plans import Cache, Launcher, call_key
from .._replay import replayed
from ._chunk_delta_h_kernel import chunk_delta_h_kernel
from ._plan import Plan, block, make_plan


@replayed
def chunk_delta_h(
    k: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    *,
    g: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
    cu_seqlens: torch.Tensor | None = None,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(h [B,NC,H_v,K,V] in k's dtype, the state before each chunk; v_new [B,T,H_v,V]; final_state [N_seq,H_v,K,V] in fp32).

    Sizes: as in `chunk_scaled_dot_kkt`. NC chunks of a batch row: ceil(T / L). Packed, sequence n's chunk c is in slot
    cu_seqlens[n] // L + n + c of NC = T // L + N_seq, and slots in which no chunk stands are not written.

    Args:
        k: [B,T,H_k,K], tokens any distance apart; float32, bfloat16 or float16; K up to 256.
        w, u: [B,T,H_v,K] and [B,T,H_v,V], of `recompute_w_u`, in k's dtype.
        g: [B,T,H_v] in fp32, of `chunk_local_cumsum`, of either sign; None for no decay.
        initial_state: [N_seq,H_v,K,V], float32, bfloat16 or float16; zeros without it.
        chunk_size: 16, 32 or 64.
        cu_seqlens: [N_seq+1], int32 or int64, the bounds of packed sequences; then B = 1. They may repeat (a sequence
            without tokens hands its state on), and rows of v_new at or past cu_seqlens[-1] are zero.
        precision: "ieee" or "tf32", how fp32 inputs are multiplied.

    Raises:
        ValueError, TypeError: before anything is launched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (k, w, u, g, initial_state, cu_seqlens)
    contract.check_precision(precision)
    key = call_key(tensors, type(chunk_size), chunk_size)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(tensors, chunk_size)
    dims: Any = plan.dims
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    h = torch.empty(dims.B, dims.NC, dims.H_v, dims.K, dims.V, dtype=k.dtype, device=k.device)
    v_new = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    final = torch.empty(dims.N_seq, dims.H_v, dims.K, dims.V, dtype=torch.float32, device=k.device)
    if dims.N_seq or v_new.numel():
        config = lookup("gdn_chunk_delta_h", **_request(plan))
        k, w, u, g, initial_state, cu_seqlens = plan.apply(tensors)
        launch(plan, dims, config, plan.strides["k"], precision, k, w, u, g, initial_state, h, v_new, final, cu_seqlens)
    return h, v_new, final


_LAUNCH = Launcher(chunk_delta_h_kernel)
_NARROW = 16
_PLANS: Cache[Plan] = Cache()


def launch(
    key, dims: contract.Dims, config: Config, k_strides: tuple[int, int], precision: str,
    k, w, u, g, initial, h, v_new, final, cu_seqlens,
) -> None:  # fmt: skip
    """`final` may be None."""
    BLOCK_SIZE_V = block(config["BLOCK_SIZE_V"], dims.V)
    num_warps = config["num_warps"]
    if precision == "tf32" and BLOCK_SIZE_V == _NARROW:
        # Triton 3.6 has 8 warps read behind their shared memory where a TF32 product is this narrow (K=128, on an H200).
        num_warps = min(num_warps, 4)
    # One sequence more for what is past the last one. One axis, because the others stop at 65,535.
    grid = ((dims.N_seq + dims.packed) * dims.H_v * -(-dims.V // BLOCK_SIZE_V), 1, 1)
    _LAUNCH(
        key,
        grid,
        (k, w, u, g, initial, h, v_new, final, cu_seqlens, dims.T, dims.NC, dims.N_seq, *k_strides),
        (
            dims.H_k, dims.H_v, dims.K, dims.V, dims.L, precision, block(contract.MAX_K, dims.K), BLOCK_SIZE_V,
            config["num_stages"],
        ),
        num_warps,
    )  # fmt: skip


def _plan(tensors, chunk_size: int) -> Plan:
    return make_plan(
        "gdn.chunk_delta_h", contract.CHUNK_DELTA_H, 3, tensors, contract.check_chunk_delta_h, tokens=("k",),
        chunk_size=chunk_size,
    )  # fmt: skip


def _request(plan: Plan) -> dict[str, Any]:
    return request(plan, plan.dims)


def request(plan: Plan, dims: Any) -> dict[str, Any]:
    return plan.request(dims.N_seq * dims.H_v, K=dims.K, V=dims.V, chunk_size=dims.L)


def config_request(
    k, w, u, *, g=None, initial_state=None, chunk_size=64, cu_seqlens=None, precision="ieee"
) -> dict[str, Any]:  # fmt: skip
    """What a call with these arguments asks the tuning table for."""
    contract.check_precision(precision)
    return _request(_plan((k, w, u, g, initial_state, cu_seqlens), chunk_size))
