"""The fourth stage of the chunked SSD scan: the products of a chunk's tokens, once for all heads of a group.

    CB[i, j] = C[i]·B[j]          i, j in the same chunk

The products are computed in the inputs' dtype and accumulated in fp32.

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
from ._bmm_chunk_kernel import bmm_chunk_kernel
from ._plan import Plan, block, make_plan


@replayed
def bmm_chunk(
    C: torch.Tensor,
    B: torch.Tensor,
    *,
    chunk_size: int,
    cu_seqlens: torch.Tensor | None = None,
    precision: str = "ieee",
) -> torch.Tensor:
    """[B,NC,G,L,L] in fp32, zero past a chunk's last token; slots in which no chunk stands are not written.

    Sizes: B batch rows, T tokens, G groups, N dstate, L chunk_size, NC chunks of a batch row, or slots for those of all packed
    sequences, as in `chunk_cumsum`.

    Args:
        C: [B,T,G,N], tokens any distance apart; float32, bfloat16 or float16.
        B: [B,T,G,N], likewise, in C's dtype.
        chunk_size: a power of two from 16 to 2048.
        cu_seqlens: [N_seq+1], the bounds of packed sequences; then B = 1. They may repeat.
        precision: "ieee" or "tf32", how fp32 inputs are multiplied.

    Raises:
        ValueError, TypeError: before anything is launched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (C, B, cu_seqlens)
    contract.check_precision(precision)
    key = call_key(tensors, contract.check_chunk_size(chunk_size))
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(tensors, chunk_size)
    dims = plan.dims
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    CB = torch.empty(dims.B, dims.NC, dims.G, dims.L, dims.L, dtype=torch.float32, device=C.device)
    if CB.numel():
        config = lookup("ssd_bmm_chunk", **_request(plan))
        C, B, cu_seqlens = plan.apply(tensors)
        strides = plan.strides["C"], plan.strides["B"]
        launch(plan, dims, config, strides, 0, plan.products(precision), False, C, B, CB, cu_seqlens)
    return CB


_LAUNCH = Launcher(bmm_chunk_kernel)
_PLANS: Cache[Plan] = Cache()


def launch(
    key, dims: contract.Dims, config: Config, strides: tuple[tuple[int, int], tuple[int, int]], aligned: int,
    products: str, causal: bool, C, B, CB, cu_seqlens,
) -> None:  # fmt: skip
    """`strides`: those of C and B. `aligned`: tokens of the chunks at which their sequences begin, or 0. `products`: of
    `Plan.products`."""
    BLOCK_SIZE_M, BLOCK_SIZE_N = block(config["BLOCK_SIZE_M"], dims.L), block(config["BLOCK_SIZE_N"], dims.L)
    (C_batch, C_token), (B_batch, B_token) = strides
    # One axis, because the others stop at 65,535.
    grid = (dims.B * dims.NC * dims.G * (dims.L // BLOCK_SIZE_M) * (dims.L // BLOCK_SIZE_N), 1, 1)
    _LAUNCH(
        key,
        grid,
        (C, B, CB, cu_seqlens, dims.T, dims.NC, dims.N_seq, C_batch, B_batch, C_token, B_token),
        (
            dims.G, dims.N, dims.L, causal, aligned, products,
            BLOCK_SIZE_M, BLOCK_SIZE_N, block(config["BLOCK_SIZE_K"], dims.N),
        ),
        config["num_warps"],
    )  # fmt: skip


def _plan(tensors, chunk_size: int) -> Plan:
    return make_plan(
        "ssd.bmm_chunk",
        contract.BMM_CHUNK,
        2,
        tensors,
        contract.check_bmm_chunk,
        tokens=("C", "B"),
        chunk_size=chunk_size,
    )


def _request(plan: Plan) -> dict[str, Any]:
    dims = plan.dims
    return plan.request(dims.B * dims.T * dims.G, dstate=dims.N, chunk_size=dims.L)


def config_request(C, B, *, chunk_size, cu_seqlens=None, precision="ieee") -> dict[str, Any]:
    """What a call with these arguments asks the tuning table for."""
    contract.check_precision(precision)
    return _request(_plan((C, B, cu_seqlens), chunk_size))
