"""The last stage of the gated delta rule: the output, from the state before each chunk and from the chunk itself.

    o[i] = scale·(base^g[i]·h^T·q[i] + Σ_{j <= i} P[i, j]·v[j])          P[i, j] = (q[i]·k[j])·base^(g[i] - g[j])

q·k^T and q·h are multiplied in q's dtype, to which h is rounded, and P is rounded to v's; products are accumulated in fp32, all
else is fp32, and o is rounded once. On Hopper what models ask for has a kernel of its own (`_chunk_o_gluon.py`), with the same
rounding points.

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
from . import _chunk_o_gluon
from ._chunk_o_kernel import chunk_o_kernel
from ._output import output_like
from ._plan import Plan, block, make_plan


@replayed
def chunk_o(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    h: torch.Tensor,
    *,
    g: torch.Tensor | None = None,
    gate_base: str = "e",
    scale: float | None = None,
    chunk_size: int = 64,
    state_layout: str = "KV",
    cu_seqlens: torch.Tensor | None = None,
    precision: str = "ieee",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """o [B,T,H_v,V] in v's dtype.

    Sizes: as in `chunk_delta_h`.

    Args:
        q, k: [B,T,H_k,K], tokens any distance apart; float32, bfloat16 or float16; K up to 256.
        v: [B,T,H_v,V], likewise, in q's dtype: the v_new of `chunk_delta_h`.
        h: [B,NC,H_v,K,V], the state before each chunk, of `chunk_delta_h`, in any of these dtypes.
        g: [B,T,H_v] in fp32, of `chunk_local_cumsum`, of either sign; None for no decay.
        gate_base: "e", or "2" where g is in powers of two.
        scale: K^-0.5 without it.
        chunk_size: 16, 32 or 64.
        state_layout: "KV", or "VK" for h [B,NC,H_v,V,K].
        cu_seqlens: [N_seq+1], int32 or int64, the bounds of packed sequences; then B = 1. They may repeat, and rows at or
            past cu_seqlens[-1] are zero.
        precision: "ieee" or "tf32", how fp32 inputs are multiplied.
        out: where to put o: a dense tensor of its shape and dtype, which may share memory with none of the inputs.

    Raises:
        ValueError, TypeError: before anything is launched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (q, k, v, h, g, cu_seqlens)
    contract.check_precision(precision)
    contract.check_gate_base(gate_base)
    key = call_key(tensors, type(chunk_size), chunk_size, contract.check_state_layout(state_layout))
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(tensors, chunk_size, state_layout)
    dims: Any = plan.dims
    scale = contract.check_scale(scale, dims.K)
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    o = output_like(v, out)
    if o.numel():
        config = lookup("gdn_chunk_o", **_request(plan))
        forms = (gate_base == "2", state_layout == "VK", precision)
        q, k, v, h, g, cu_seqlens = plan.apply(tensors)
        launch(plan, dims, config, plan.strides, forms, scale, q, k, v, h, g, cu_seqlens, o)
    return o


_LAUNCH = Launcher(chunk_o_kernel)
_PLANS: Cache[Plan] = Cache()


def launch(
    key, dims: contract.Dims, config: Config, strides: dict[str, tuple[int, int]], forms: tuple[bool, bool, str],
    scale: float, q, k, v, h, g, cu_seqlens, o,
) -> None:  # fmt: skip
    """`strides`: those of q, k and v, batch row and token. `forms`: gates in powers of two, h [V,K], precision."""
    strides = {name: strides[name] for name in ("q", "k", "v")}
    if _chunk_o_gluon.serves(dims, strides, q, k, v, h, o):
        shape = (config["HEADS"], config["num_stages"])
        _chunk_o_gluon.launch(key, dims, *shape, strides, *forms[:2], scale, q, k, v, h, g, cu_seqlens, o)
        return
    batch, token = zip(*strides.values(), strict=True)
    BLOCK_SIZE_V = block(config["BLOCK_SIZE_V"], dims.V)
    # Heads in a loop only with operands that the loop can hand from memory to tensor cores.
    HEADS = config["HEADS"] if h.dtype == q.dtype and q.dtype != torch.float32 else 1
    while dims.H_v // dims.H_k % HEADS:
        HEADS -= 1
    # Of all packed tokens the padding may need one slot more. One axis, because the others stop at 65,535.
    slots = dims.B * dims.NC + dims.packed
    grid = (slots * (dims.H_v // HEADS) * -(-dims.V // BLOCK_SIZE_V), 1, 1)
    _LAUNCH(
        key,
        grid,
        (q, k, v, h, g, o, cu_seqlens, dims.T, dims.NC, dims.N_seq, *batch, *token, scale),
        (
            dims.H_k, dims.H_v, dims.K, dims.V, dims.L, *forms, HEADS, block(config["BLOCK_SIZE_K"], dims.K),
            BLOCK_SIZE_V, config["num_stages"],
        ),
        config["num_warps"],
    )  # fmt: skip


def _plan(tensors, chunk_size: int, state_layout: str) -> Plan:
    return make_plan(
        "gdn.chunk_o", contract.CHUNK_O, 4, tensors, contract.check_chunk_o, tokens=("q", "k", "v"),
        chunk_size=chunk_size, state_layout=state_layout,
    )  # fmt: skip


def _request(plan: Plan) -> dict[str, Any]:
    return request(plan, plan.dims)


def request(plan: Plan, dims: Any) -> dict[str, Any]:
    return plan.request(dims.B * dims.T * dims.H_v, K=dims.K, V=dims.V, chunk_size=dims.L)


def config_request(
    q,
    k,
    v,
    h,
    *,
    g=None,
    gate_base="e",
    scale=None,
    chunk_size=64,
    state_layout="KV",
    cu_seqlens=None,
    precision="ieee",
) -> dict[str, Any]:
    """What a call with these arguments asks the tuning table for."""
    contract.check_precision(precision)
    contract.check_gate_base(gate_base)
    plan = _plan((q, k, v, h, g, cu_seqlens), chunk_size, contract.check_state_layout(state_layout))
    contract.check_scale(scale, plan.dims.K)
    return _request(plan)
