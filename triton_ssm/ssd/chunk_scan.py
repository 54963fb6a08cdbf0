"""The last stage of the chunked SSD scan: y from the state before each chunk and the products within it.

    y[i] = exp(dA_cumsum[i])·(S·C[i]) + Σ_{j <= i} M[i, j]·x[j] + D·x[i], then · silu(z[i])
    M[i, j] = CB[i, j]·exp(min(dA_cumsum[i] - dA_cumsum[j], 0))·dt[j]

S is rounded to C's dtype and M to x's for the products, which are accumulated in fp32, as everything else is computed; y is
rounded once.

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
from ._chunk_scan_kernel import chunk_scan_kernel
from ._plan import Plan, block, dense_output, make_plan


@replayed
def chunk_scan(
    CB: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    dA_cumsum: torch.Tensor,
    C: torch.Tensor,
    states: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    precision: str = "ieee",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [B,T,H,P] in x's dtype; rows at or past cu_seqlens[-1] are zero.

    Sizes: as in `chunk_state`.

    Args:
        CB: [B,NC,G,L,L] in fp32, of `bmm_chunk`.
        x: [B,T,H,P], tokens any distance apart; float32, bfloat16 or float16.
        dt, dA_cumsum: [B,H,NC,L] in fp32, of `chunk_cumsum`.
        C: [B,T,G,N], as x, in x's dtype.
        states: [B,NC,H,P,N], the state before each chunk, of `state_passing`; float32, bfloat16 or float16.
        D: [H] or [H,P], the skip.
        z: [B,T,H,P], the gate; as x, in x's dtype.
        cu_seqlens: [N_seq+1], the bounds of packed sequences; then B = 1. They may repeat.
        precision: "ieee" or "tf32", how fp32 inputs are multiplied.
        out: where to put y: a dense tensor of its shape and dtype, which shares no memory with x.

    Raises:
        ValueError, TypeError: before anything is launched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (CB, x, dt, dA_cumsum, C, states, D, z, cu_seqlens)
    contract.check_precision(precision)
    key = call_key(tensors)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(tensors)
    dims = plan.dims
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    y = dense_output(x, out)
    if y.numel():
        config = lookup("ssd_chunk_scan", **_request(plan))
        CB, x, dt, dA_cumsum, C, states, D, z, cu_seqlens = plan.apply(tensors)
        strides = tuple(plan.strides.get(name, (0, 0)) for name in ("x", "C", "z"))
        launch(
            plan,
            dims,
            config,
            strides,
            0,
            plan.products(precision),
            CB,
            x,
            dt,
            dA_cumsum,
            C,
            states,
            D,
            z,
            y,
            cu_seqlens,
        )
    return y


_LAUNCH = Launcher(chunk_scan_kernel)
_PLANS: Cache[Plan] = Cache()


def launch(
    key, dims: contract.Dims, config: Config, strides: tuple[tuple[int, int], ...], aligned: int, products: str,
    CB, x, dt, dA_cumsum, C, states, D, z, y, cu_seqlens,
) -> None:  # fmt: skip
    """`strides`: those of x, C and z. `aligned`: tokens of the chunks at which the sequences of x and C begin, or 0.
    `products`: of `Plan.products`."""
    BLOCK_SIZE_M, BLOCK_SIZE_N = block(config["BLOCK_SIZE_M"], dims.L), block(config["BLOCK_SIZE_N"], dims.P)
    (x_batch, x_token), (C_batch, C_token), (z_batch, z_token) = strides
    # Of all packed tokens the padding may need one slot more. One axis, because the others stop at 65,535.
    slots = dims.B * dims.NC + dims.packed
    grid = (slots * dims.H * (dims.L // BLOCK_SIZE_M) * -(-dims.P // BLOCK_SIZE_N), 1, 1)
    _LAUNCH(
        key,
        grid,
        (
            CB, x, dt, dA_cumsum, C, states, D, z, y, cu_seqlens,
            dims.T, dims.NC, dims.N_seq, x_batch, C_batch, z_batch, x_token, C_token, z_token,
        ),
        (
            dims.H, dims.G, dims.P, dims.N, dims.L, D is not None and D.dim() == 2, aligned, products,
            BLOCK_SIZE_M, BLOCK_SIZE_N, block(config["BLOCK_SIZE_K"], dims.L),
            block(config["BLOCK_SIZE_DSTATE"], dims.N), config["num_stages"],
        ),
        config["num_warps"],
    )  # fmt: skip


def _plan(tensors) -> Plan:
    return make_plan(
        "ssd.chunk_scan", contract.CHUNK_SCAN, 6, tensors, contract.check_chunk_scan, tokens=("x", "C", "z"),
        dtype_of="x",
    )  # fmt: skip


def _request(plan: Plan) -> dict[str, Any]:
    dims = plan.dims
    return plan.request(dims.B * dims.T * dims.H, headdim=dims.P, dstate=dims.N, chunk_size=dims.L)


def config_request(
    CB, x, dt, dA_cumsum, C, states, *, D=None, z=None, cu_seqlens=None, precision="ieee"
) -> dict[str, Any]:
    """What a call with these arguments asks the tuning table for."""
    contract.check_precision(precision)
    return _request(_plan((CB, x, dt, dA_cumsum, C, states, D, z, cu_seqlens)))
