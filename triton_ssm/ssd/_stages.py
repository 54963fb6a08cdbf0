"""`mamba_chunk_scan_combined` as its five stages, one after another: for every shape, dtype and option.

Between the stages stand, in fp32, dt and dA_cumsum (2·H·L floats a chunk), the states before each chunk (H·P·N), which take the
place of the states that the chunks leave, and the products C·B^T (G·L²).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ssm_configs import lookup
from ssm_configs.config import Config
from ssm_configs.contracts import ssd as contract

from ._plan import Plan
from .bmm_chunk import launch as launch_bmm_chunk
from .chunk_cumsum import launch as launch_chunk_cumsum
from .chunk_scan import launch as launch_chunk_scan
from .chunk_state import launch as launch_chunk_state
from .state_passing import launch as launch_state_passing

# Longer chunks of the caller's are cut into these. The products within a chunk grow with its length, the states between chunks
# shrink: on an H200 128 tokens took less than 64 and 256 (T=8192 H=128, T=8192 H=80 and T=1024 H=128). A sequence that is
# resumed at the end of a caller's chunk still has all its chunks where they were.
_LONGEST = 128


@dataclass(frozen=True)
class Stages:
    """What follows from the sizes of a call."""

    dims: contract.Dims
    """Those of the call, in chunks of the stages."""
    requests: Mapping[str, Mapping[str, Any]]
    """What each stage's tuning table is asked for."""


def make_stages(plan: Plan, dt_dtype: str) -> Stages:
    given = plan.dims
    L = min(given.L, _LONGEST)
    dims = replace(given, L=L, NC=contract.chunks(given.T, L, given.N_seq, given.packed))
    tokens, P, N = dims.B * dims.T, dims.P, dims.N
    requests = {
        "ssd_chunk_cumsum": plan.request(tokens, nheads=dims.H, chunk_size=L) | {"dtype": dt_dtype},
        "ssd_chunk_state": plan.request(tokens * dims.H, headdim=P, dstate=N, chunk_size=L),
        "ssd_state_passing": plan.request(dims.N_seq * dims.H, headdim=P, dstate=N) | {"dtype": "float32"},
        "ssd_bmm_chunk": plan.request(tokens * dims.G, dstate=N, chunk_size=L),
        "ssd_chunk_scan": plan.request(tokens * dims.H, headdim=P, dstate=N, chunk_size=L),
    }
    return Stages(dims, requests)


def configs(stages: Stages) -> dict[str, Config]:
    return {op: lookup(op, **request) for op, request in stages.requests.items()}


def run(
    plan: Plan, stages: Stages, config: Mapping[str, Config],
    x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, y, final, final_indices, intermediate,
    *, dt_softplus: bool, dt_limit: tuple[float, float], chunk_aligned: bool, precision: str,
) -> None:  # fmt: skip
    """The tensors as `plan` has them. `final`: None, [N_seq,H,P,N], or a pool with the slots `final_indices`."""
    dims, strides = stages.dims, plan.strides
    aligned, products = plan.dims.L if chunk_aligned else 0, plan.products(precision)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    dA_cumsum, step = (torch.empty(dims.B, dims.H, dims.NC, dims.L, **fp32) for _ in range(2))
    states = torch.empty(dims.B, dims.NC, dims.H, dims.P, dims.N, **fp32)
    if step.numel():
        launch_chunk_cumsum(
            plan, dims, config["ssd_chunk_cumsum"], strides["dt"], dt_softplus, dt_limit,
            dt, A, dt_bias, dA_cumsum, step, cu_seqlens,
        )  # fmt: skip
        launch_chunk_state(
            plan, dims, config["ssd_chunk_state"], (strides["x"], strides["B"]), aligned, products,
            x, B, step, dA_cumsum, states, cu_seqlens,
        )  # fmt: skip
    if dims.N_seq:
        launch_state_passing(
            plan, dims, config["ssd_state_passing"], plan.dims.L // dims.L,
            states, dA_cumsum, initial_states, states, intermediate, final, final_indices, cu_seqlens,
        )  # fmt: skip
    if y.numel():
        CB = torch.empty(dims.B, dims.NC, dims.G, dims.L, dims.L, **fp32)
        if CB.numel():
            launch_bmm_chunk(
                plan, dims, config["ssd_bmm_chunk"], (strides["C"], strides["B"]), aligned, products, True,
                C, B, CB, cu_seqlens,
            )  # fmt: skip
        launch_chunk_scan(
            plan, dims, config["ssd_chunk_scan"], (strides["x"], strides["C"], strides.get("z", (0, 0))), aligned, products,
            CB, x, step, dA_cumsum, C, states, D, z, y, cu_seqlens,
        )  # fmt: skip
