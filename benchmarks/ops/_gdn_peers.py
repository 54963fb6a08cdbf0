"""FLA's and vLLM's stages of the gated delta rule. FLA's gates are in powers of two from `chunk_scaled_dot_kkt` on."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ..op import Tensors
from ..peers import Peer
from . import _gdn as common
from ._stages import is_dense, width

Function = Callable[..., Any]
Made = Callable[[], dict[str, torch.Tensor]]
Adapt = Callable[..., Made]


def _peers(
    vllm_module: str, fla_module: str, function: str, vllm: Adapt, fla: Adapt, vllm_slack: float = 10.0
) -> tuple[Peer, ...]:
    def takes(case) -> bool:
        return is_dense(case) and (width(case) == 2 or case.op in _FP32)

    return (
        common.VllmPeer("vllm", vllm_module, function, vllm, takes, autotunes=True, slack=vllm_slack),
        Peer("fla", fla_module, function, fla, takes, autotunes=True),
    )


# Stages of which nothing has the activations' dtype.
_FP32 = ("gdn.chunk_local_cumsum", "gdn.solve_tril")


def _chunk_local_cumsum(function: Function, tensors: Tensors, out: None, *, chunk_size: int) -> Made:
    g = tensors["g"]
    return lambda: {"g": function(g, chunk_size)}


def _kkt(base: float) -> Adapt:
    def adapt(function: Function, tensors: Tensors, out: None, *, chunk_size: int) -> Made:
        k, beta, g = tensors["k"], tensors["beta"], tensors["g"] / math.log(base)
        return lambda: {"A": function(k=k, g=g, beta=beta, chunk_size=chunk_size)}

    return adapt


def _solve_tril(function: Function, tensors: Tensors, out: None) -> Made:
    A = tensors["A"]
    return lambda: {"inverse": function(A=A)}


def _w_u(base: float, gate: str) -> Adapt:
    def adapt(function: Function, tensors: Tensors, out: None) -> Made:
        arguments = {name: tensors[name] for name in ("k", "v", "beta", "A")}
        arguments[gate] = tensors["g"] / math.log(base)
        # vLLM has no default for packed sequences' bounds.
        packed = {"cu_seqlens": None, "chunk_indices": None}

        def call() -> dict[str, torch.Tensor]:
            w, u = function(**arguments, **packed)
            return {"w": w, "u": u}

        return call

    return adapt


def _delta_h(base: float, values_first: bool) -> Adapt:
    """`values_first`: its states are [V,K]."""

    def adapt(function: Function, tensors: Tensors, out: None, *, chunk_size: int) -> Made:
        arguments: dict[str, Any] = {name: tensors[name] for name in ("k", "w", "u")}
        arguments["g"] = tensors["g"] / math.log(base)
        initial = tensors.get("initial_state")
        arguments["initial_state"] = common.swapped(initial) if values_first else initial

        def call() -> dict[str, torch.Tensor]:
            h, v_new, final = function(**arguments, output_final_state=True, chunk_size=chunk_size)
            if values_first:
                h, final = h.transpose(-1, -2), final.transpose(-1, -2)
            return {"h": h, "v_new": v_new, "final": final}

        return call

    return adapt


CHUNK_LOCAL_CUMSUM = _peers(
    "cumsum", "fla.ops.utils.cumsum", "chunk_local_cumsum", _chunk_local_cumsum, _chunk_local_cumsum
)
# vLLM multiplies beta·k, in fp32, by k as TF32 products, which have 11 bits of it.
CHUNK_SCALED_DOT_KKT = _peers(
    "chunk_scaled_dot_kkt", "fla.ops.common.chunk_scaled_dot_kkt", "chunk_scaled_dot_kkt_fwd", _kkt(math.e), _kkt(2),
    vllm_slack=100.0,
)  # fmt: skip
SOLVE_TRIL = _peers("solve_tril", "fla.ops.utils.solve_tril", "solve_tril", _solve_tril, _solve_tril)
RECOMPUTE_W_U = _peers(
    "wy_fast", "fla.ops.gated_delta_rule.wy_fast", "recompute_w_u_fwd", _w_u(math.e, "g_cumsum"), _w_u(2, "g")
)
CHUNK_DELTA_H = _peers(
    "chunk_delta_h", "fla.ops.common.chunk_delta_h", "chunk_gated_delta_rule_fwd_h", _delta_h(math.e, True),
    _delta_h(2, False),
)  # fmt: skip
