"""vLLM's and mamba_ssm's stages of the chunked SSD scan. vLLM's have no batch axis."""

from collections.abc import Callable
from typing import Any

import torch

from ..op import Tensors
from ..peers import Peer
from ._ssd import chunk_bounds
from ._stages import is_dense, is_one_sequence

Function = Callable[..., Any]
Made = Callable[[], dict[str, torch.Tensor]]


def _peers(module: str, function: str, vllm: Callable[..., Made], mamba_ssm: Callable[..., Made]) -> tuple[Peer, ...]:
    """Both call them alike."""
    return (
        Peer("vllm", f"vllm.model_executor.layers.mamba.ops.{module}", function, vllm, is_one_sequence, autotunes=True),
        Peer("mamba_ssm", f"mamba_ssm.ops.triton.{module}", function, mamba_ssm, is_dense, autotunes=True),
    )


def _bounds(like: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Of a tensor [1,T,…]."""
    return chunk_bounds(like.shape[1], chunk_size, like.device)


def _chunk_cumsum(dA_cumsum: torch.Tensor, dt: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"dA_cumsum": dA_cumsum, "dt": dt}


def _vllm_chunk_cumsum(
    function: Function, tensors: Tensors, out: None, *, chunk_size: int, dt_softplus: bool
) -> Made:  # fmt: skip
    dt, A, bounds = tensors["dt"][0], tensors["A"], _bounds(tensors["dt"], chunk_size)
    options = {"dt_bias": tensors["dt_bias"], "dt_softplus": dt_softplus}

    def call() -> dict[str, torch.Tensor]:
        dA_cumsum, step = function(dt, A, chunk_size, bounds, **options)
        return _chunk_cumsum(dA_cumsum[None], step[None])

    return call


def _mamba_chunk_cumsum(
    function: Function, tensors: Tensors, out: None, *, chunk_size: int, dt_softplus: bool
) -> Made:  # fmt: skip
    dt, A, dt_bias = (tensors[name] for name in ("dt", "A", "dt_bias"))
    return lambda: _chunk_cumsum(*function(dt, A, chunk_size, dt_bias=dt_bias, dt_softplus=dt_softplus))


def _vllm_chunk_state(function: Function, tensors: Tensors, out: None) -> Made:
    x, B, dt, dA_cumsum = (tensors[name][0] for name in ("x", "B", "dt", "dA_cumsum"))
    bounds = _bounds(tensors["x"], dt.shape[-1])
    return lambda: {"states": function(B, x, dt, dA_cumsum, bounds, states_in_fp32=True)[None]}


def _mamba_chunk_state(function: Function, tensors: Tensors, out: None) -> Made:
    x, B, dt, dA_cumsum = (tensors[name] for name in ("x", "B", "dt", "dA_cumsum"))
    return lambda: {"states": function(B, x, dt, dA_cumsum, states_in_fp32=True)}


def _vllm_state_passing(function: Function, tensors: Tensors, out: None) -> Made:
    """It returns the states after chunks, of which the last is the final one."""
    states, dA_cumsum = tensors["states"][0], tensors["dA_cumsum"][0]
    shape = states.shape[1:]
    flat = states.flatten(-2)
    initial = tensors["initial_states"].flatten(-2) if "initial_states" in tensors else None
    last = torch.tensor([len(states) - 1], dtype=torch.int32, device=states.device)

    def call() -> dict[str, torch.Tensor]:
        after = function(flat, dA_cumsum, last, initial_states=initial, out_dtype=torch.float32)
        return {"final": after[-1:].view(1, *shape)}

    return call


def _mamba_state_passing(function: Function, tensors: Tensors, out: None) -> Made:
    states, totals = tensors["states"], tensors["dA_cumsum"][..., -1]
    headdim = states.shape[3:]
    flat = states.flatten(-2)
    initial = tensors["initial_states"].flatten(-2) if "initial_states" in tensors else None

    def call() -> dict[str, torch.Tensor]:
        before, final = function(flat, totals, initial_states=initial)
        return {"before": before.unflatten(-1, headdim), "final": final.unflatten(-1, headdim)}

    return call


def _vllm_bmm_chunk(function: Function, tensors: Tensors, out: None, *, chunk_size: int) -> Made:
    C, B, bounds = tensors["C"][0], tensors["B"][0], _bounds(tensors["C"], chunk_size)
    return lambda: {"CB": function(C, B, chunk_size, bounds, output_dtype=torch.float32)[None]}


def _mamba_bmm_chunk(function: Function, tensors: Tensors, out: None, *, chunk_size: int) -> Made:
    C, B = tensors["C"], tensors["B"]
    return lambda: {"CB": function(C, B, chunk_size, output_dtype=torch.float32)}


_SCAN = ("CB", "x", "dt", "dA_cumsum", "C", "states")


def _vllm_chunk_scan(function: Function, tensors: Tensors, out: torch.Tensor) -> Made:
    """It takes the states after chunks, and what is before the first as an initial state."""
    CB, x, dt, dA_cumsum, C, before = (tensors[name][0] for name in _SCAN)
    after, first = before.roll(-1, 0), before[:1].clone()
    bounds = _bounds(tensors["x"], dt.shape[-1])
    one_sequence = torch.zeros(len(before), dtype=torch.int32, device=x.device)

    def call() -> dict[str, torch.Tensor]:
        function(
            CB, x, dt, dA_cumsum, C, after, bounds, out[0], one_sequence, D=tensors.get("D"), initial_states=first
        )  # fmt: skip
        return {"y": out}

    return call


def _mamba_chunk_scan(function: Function, tensors: Tensors, out: torch.Tensor) -> Made:
    del out  # it allocates its own
    arguments = [tensors[name] for name in _SCAN]
    return lambda: {"y": function(*arguments, D=tensors.get("D"))[0]}


CHUNK_CUMSUM = _peers("ssd_chunk_state", "_chunk_cumsum_fwd", _vllm_chunk_cumsum, _mamba_chunk_cumsum)
CHUNK_STATE = _peers("ssd_chunk_state", "_chunk_state_fwd", _vllm_chunk_state, _mamba_chunk_state)
STATE_PASSING = _peers("ssd_state_passing", "_state_passing_fwd", _vllm_state_passing, _mamba_state_passing)
BMM_CHUNK = _peers("ssd_bmm", "_bmm_chunk_fwd", _vllm_bmm_chunk, _mamba_bmm_chunk)
CHUNK_SCAN = _peers("ssd_chunk_scan", "_chunk_scan_fwd", _vllm_chunk_scan, _mamba_chunk_scan)
