"""The second stage of the chunked SSD scan: the state that each chunk leaves when it starts from zero.

    states[c] = Σ_t (x[t]·dt[t]·exp(min(dA_cumsum[last] - dA_cumsum[t], 0))) ⊗ B[t]       t in chunk c

The weighted x is rounded to x's dtype for the product, which is accumulated in fp32.

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
from ._chunk_state_kernel import chunk_state_kernel
from ._plan import Plan, block, make_plan


@replayed
def chunk_state(
    x: torch.Tensor,
    B: torch.Tensor,
    dt: torch.Tensor,
    dA_cumsum: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    precision: str = "ieee",
) -> torch.Tensor:
    """[B,NC,H,P,N] in fp32; slots in which no chunk stands are not written.

    Sizes: B batch rows, T tokens, H heads, G groups (H % G == 0), P headdim, N dstate, L chunk size, NC chunks of a batch row,
    or slots for those of all packed sequences, as in `chunk_cumsum`.

    Args:
        x: [B,T,H,P], tokens any distance apart; float32, bfloat16 or float16.
        B: [B,T,G,N], likewise, in x's dtype.
        dt, dA_cumsum: [B,H,NC,L] in fp32, of `chunk_cumsum`.
        cu_seqlens: [N_seq+1], the bounds of packed sequences; then B = 1. They may repeat.
        precision: "ieee" or "tf32", how fp32 inputs are multiplied.

    Raises:
        ValueError, TypeError: before anything is launched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (x, B, dt, dA_cumsum, cu_seqlens)
    contract.check_precision(precision)
    key = call_key(tensors)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(tensors)
    dims = plan.dims
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    states = torch.empty(dims.B, dims.NC, dims.H, dims.P, dims.N, dtype=torch.float32, device=x.device)
    if states.numel():
        config = lookup("ssd_chunk_state", **_request(plan))
        x, B, dt, dA_cumsum, cu_seqlens = plan.apply(tensors)
        strides = plan.strides["x"], plan.strides["B"]
        launch(plan, dims, config, strides, 0, plan.products(precision), x, B, dt, dA_cumsum, states, cu_seqlens)
    return states


_LAUNCH = Launcher(chunk_state_kernel)
_PLANS: Cache[Plan] = Cache()


def launch(
    key, dims: contract.Dims, config: Config, strides: tuple[tuple[int, int], tuple[int, int]], aligned: int,
    products: str, x, B, dt, dA_cumsum, states, cu_seqlens,
) -> None:  # fmt: skip
    """`strides`: those of x and B. `aligned`: tokens of the chunks at which their sequences begin, or 0. `products`: of
    `Plan.products`."""
    BLOCK_SIZE_M, BLOCK_SIZE_N = block(config["BLOCK_SIZE_M"], dims.P), block(config["BLOCK_SIZE_N"], dims.N)
    (x_batch, x_token), (B_batch, B_token) = strides
    # One axis, because the others stop at 65,535; the blocks of one chunk run fastest, for they read the same rows.
    grid = (dims.B * dims.NC * dims.H * -(-dims.P // BLOCK_SIZE_M) * -(-dims.N // BLOCK_SIZE_N), 1, 1)
    _LAUNCH(
        key,
        grid,
        (
            x, B, dt, dA_cumsum, states, cu_seqlens,
            dims.T, dims.NC, dims.N_seq, x_batch, B_batch, x_token, B_token,
        ),
        (
            dims.H, dims.G, dims.P, dims.N, dims.L, aligned, products,
            BLOCK_SIZE_M, BLOCK_SIZE_N, block(config["BLOCK_SIZE_K"], dims.L), config["num_stages"],
        ),
        config["num_warps"],
    )  # fmt: skip


def _plan(tensors) -> Plan:
    return make_plan(
        "ssd.chunk_state", contract.CHUNK_STATE, 4, tensors, contract.check_chunk_state, tokens=("x", "B")
    )  # fmt: skip


def _request(plan: Plan) -> dict[str, Any]:
    dims = plan.dims
    return plan.request(dims.B * dims.T * dims.H, headdim=dims.P, dstate=dims.N, chunk_size=dims.L)


def config_request(x, B, dt, dA_cumsum, *, cu_seqlens=None, precision="ieee") -> dict[str, Any]:
    """What a call with these arguments asks the tuning table for."""
    contract.check_precision(precision)
    return _request(_plan((x, B, dt, dA_cumsum, cu_seqlens)))
