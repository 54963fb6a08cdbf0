"""`causal_conv1d_update` the way serving decodes: one token a sequence, slots in random order, bias and SiLU."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from parity_tests.cases import Case
from ssm_configs import SPECS
from ssm_configs.spec import Knobs

from ..op import BenchOp, Operand, Piece, Sweep, Tensors, point_name
from ..peers import Peer
from . import _causal_conv1d as common

_OPTIONS = {"bias": True, "activation": "silu", "slots": True}
_BATCHES = tuple(1 << power for power in range(11))


def _decode(name: str, B: int, D: int, W: int, dtype: str) -> Case:
    # spare slots show that nothing else is written
    return Case("causal_conv1d_update", name, {"S": B + 3, "L": W - 1, "B": B, "D": D, "W": W}, dtype, dtype, _OPTIONS)


def _case(size: int, statics: Mapping[str, int], dtype: str) -> Case:
    B, D = common.rows_and_channels(size)
    return _decode(f"{B} x {D}", B, D, statics["width"], common.x_dtype(dtype))


def _over_batches(D: int) -> Sweep:
    return Sweep(_BATCHES, lambda B, dtype: _decode(point_name("B", B, f"D={D}"), B, D, 4, dtype))


def _table_key(case: Case) -> tuple[int, dict[str, int]]:
    return case.dims["B"] * case.dims["D"], {"width": case.dims["W"]}


def _single(case: Case) -> Case:
    return replace(case.with_dims(S=2, B=1), name="single")


def _operands(case: Case) -> dict[str, Operand]:
    common.check_options(case, _OPTIONS)
    S, L, B, D, W = (case.dims[key] for key in ("S", "L", "B", "D", "W"))
    return {
        "x": Operand((B, D), case.dtype, common.normal),
        "conv_state": Operand((S, L, D), case.dtype, common.normal),
        "weight": Operand((D, W), case.dtype, common.weight),
        "bias": Operand((D,), case.dtype, common.weight),
        "conv_state_indices": Operand((B,), "int32", partial(common.slots, S=S)),
    }


def _pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    S, L, B, D, W = (case.dims[key] for key in ("S", "L", "B", "D", "W"))
    pool, slots = tensors["conv_state"], tensors["conv_state_indices"].long()
    rows_each = max(1, common.CHUNK // (D * max(L, W)))
    for rows in (slice(start, min(start + rows_each, B)) for start in range(0, B, rows_each)):
        old = pool[slots[rows]]
        window = torch.cat([old[:, : W - 1], tensors["x"][rows, None]], dim=1)
        yield Piece("y", rows, common.convolve(window.transpose(0, 1), tensors)[0])
        yield Piece("conv_state", slots[rows], torch.cat([window[:, 1:], old[:, W - 1 :]], dim=1).double())
    spare = torch.ones(S, dtype=torch.bool, device=slots.device)
    spare[slots] = False
    yield Piece("conv_state", spare, pool[spare].double())


def _bytes(case: Case) -> int:
    B, D, W = (case.dims[key] for key in ("B", "D", "W"))
    # x, y, and the state's rows in and out
    sequence = 2 * D + 2 * (W - 1) * D
    return (B * sequence + D * (W + 1)) * getattr(torch, case.dtype).itemsize + 4 * B


def _candidates(twin: str, statics: Mapping[str, int], dtype: str) -> list[Knobs]:
    if twin == "triton":
        return [
            {**launch, "BLOCK_SIZE_B": sequences}
            for launch in common.vector_launches(dtype, 2048)
            for sequences in (1, 2, 4)
        ]
    # at least a channel for every thread
    return [
        {"BLOCK_SIZE_D": channels, "BLOCK_SIZE_B": sequences}
        for channels in (128, 256, 512, 1024, 2048)
        for sequences in (1, 2, 4, 8)
        if channels * sequences <= 4096
    ]


def _vllm(function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, **scalars: Any) -> Callable[[], Any]:
    # [S,D,L] with dense channels is a view of ours. Slot 0 is its padding unless told otherwise; here every slot is live.
    x, states, weight, bias = tensors["x"], tensors["conv_state"].transpose(1, 2), tensors["weight"], tensors["bias"]
    slots = tensors["conv_state_indices"]
    return lambda: function(x, states, weight, bias, "silu", conv_state_indices=slots, null_block_id=-1, out=out)


def _fla(function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, **scalars: Any) -> Callable[[], Any]:
    """It has no slots: its states lie in a tensor of its own, gathered beforehand."""
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    W = weight.shape[1]
    cache = common.fla_state(tensors["conv_state"][tensors["conv_state_indices"].long(), : W - 1])
    del out  # it allocates its own
    return lambda: {"y": function(x, cache, weight=weight, bias=bias, activation="silu")[0]}


def _dao(function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, **scalars: Any) -> Callable[[], Any]:
    x, states, weight, bias = tensors["x"], tensors["conv_state"].transpose(1, 2), tensors["weight"], tensors["bias"]
    del out
    return lambda: function(x, states, weight, bias, "silu", conv_state_indices=tensors["conv_state_indices"])


CAUSAL_CONV1D_UPDATE = BenchOp(
    spec=SPECS["causal_conv1d_update"],
    positional=("x", "conv_state", "weight"),
    scalars=lambda case: {"activation": "silu"},
    output="x",
    mutated=("conv_state",),
    exact=("conv_state",),
    # Powers of four sequences, and of two where a wave of blocks more or less is much of the time.
    sizes=tuple(10240 << power for power in (0, 2, 4, 5, 6, 7, 8, 9, 10, 12)),
    # a few blocks, about one wave, streaming
    first_sizes=(10240 << 2, 10240 << 6, 10240 << 10),
    grid={"width": (4,)},
    sweeps={"D=10240": _over_batches(10240), "D=5376": _over_batches(5376)},
    run_dtypes=("bfloat16",),
    dtype_field="dtype",
    case=_case,
    table_key=_table_key,
    single=_single,
    operands=_operands,
    pieces=_pieces,
    bytes_moved=_bytes,
    flops=lambda case: common.flops(case.dims["B"] * case.dims["D"], case.dims["W"]),
    candidates=_candidates,
    peers=(
        Peer("vllm", "vllm.model_executor.layers.mamba.ops.causal_conv1d", "causal_conv1d_update", _vllm),
        Peer("fla", "fla.modules.causal_conv1d", "causal_conv1d_update", _fla, autotunes=True),
        Peer("causal_conv1d", "causal_conv1d", "causal_conv1d_update", _dao, lambda case: case.dims["W"] <= 4),
    ),
)
