"""`causal_conv1d` the way serving calls it for prompts: packed sequences, states in slots, bias and SiLU.

A sweep without cu_seqlens and pool is the training forward.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from parity_tests.cases import CONV_CHANNELS, Case
from ssm_configs import SPECS
from ssm_configs.spec import Knobs

from ..op import BenchOp, Operand, Piece, Sweep, Tensors, point_name
from ..peers import Peer
from . import _causal_conv1d as common

_OPTIONS = {"bias": True, "activation": "silu"}
# A single sequence in tenths of all tokens, and four that end in the midst of any block.
_ONE, _FOUR = (10,), (1, 4, 2, 3)
_TOKENS = tuple(1 << power for power in range(8, 17))


def _prefill(name: str, T: int, D: int, W: int, dtype: str, tenths: tuple[int, ...] = ()) -> Case:
    """Packed with a pool, or dense and without states where `tenths` is empty."""
    options: dict[str, Any] = dict(_OPTIONS)
    if tenths:
        lengths = [T * tenth // 10 for tenth in tenths]
        lengths[-1] += T - sum(lengths)
        options |= {"lengths": tuple(lengths), "pool": True}
    return Case("causal_conv1d", name, {"B": 1, "T": T, "D": D, "W": W}, dtype, dtype, options)


def _case(size: int, statics: Mapping[str, int], dtype: str) -> Case:
    T, D = common.rows_and_channels(size)
    return _prefill(f"{T} x {D}", T, D, statics["width"], common.x_dtype(dtype), _ONE)


def _over_tokens(line: str, tenths: tuple[int, ...]) -> Sweep:
    name = partial(point_name, "T", line=f"{line}, D=10240")
    return Sweep(_TOKENS, lambda T, dtype: _prefill(name(T), T, 10240, 4, dtype, tenths))


def _over_channels(line: str, tenths: tuple[int, ...]) -> Sweep:
    name = partial(point_name, "D", line=f"{line}, T=8192")
    return Sweep(tuple(CONV_CHANNELS.values()), lambda D, dtype: _prefill(name(D), 8192, D, 4, dtype, tenths))


def _table_key(case: Case) -> tuple[int, dict[str, int]]:
    return case.dims["B"] * case.dims["T"] * case.dims["D"], {"width": case.dims["W"]}


def _single(case: Case) -> Case:
    lengths = (8,) * len(case.options.get("lengths", ()))
    options = {**case.options, "lengths": lengths} if lengths else case.options
    return replace(case.with_dims(B=1, T=sum(lengths) or 8), name="single", options=options)


def _lengths(case: Case) -> tuple[int, ...]:
    return case.options.get("lengths", (case.dims["T"],) * case.dims["B"])


def _operands(case: Case) -> dict[str, Operand]:
    common.check_options(case, (*_OPTIONS, "lengths", "pool", "initial"))
    B, T, D, W = (case.dims[key] for key in ("B", "T", "D", "W"))
    lengths, dtype = _lengths(case), case.dtype
    N_seq = len(lengths)

    def bounds(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.copy_(torch.tensor([0, *lengths]).cumsum(0))

    def history(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.copy_(torch.arange(N_seq) % 3 != 1)

    operands = {
        "x": Operand((B, T, D), dtype, common.normal),
        "weight": Operand((D, W), dtype, common.weight),
        "bias": Operand((D,), dtype, common.weight),
    }
    if "lengths" in case.options:
        operands["cu_seqlens"] = Operand((N_seq + 1,), "int32", bounds)
    if case.options.get("initial"):
        operands["initial_state"] = Operand((N_seq, W - 1, D), dtype, common.normal)
    if case.options.get("pool"):
        S = N_seq + 3  # spare slots show that nothing else is written
        operands["conv_state"] = Operand((S, W - 1, D), dtype, common.normal)
        operands["state_indices"] = Operand((N_seq,), "int32", partial(common.slots, S=S))
        operands["has_initial_state"] = Operand((N_seq,), "bool", history)
    return operands


def _bounds(tensors: Tensors) -> list[int]:
    """Where sequences begin and end among all rows; dense rows are sequences of one length."""
    if "cu_seqlens" in tensors:
        return tensors["cu_seqlens"].tolist()
    B, T, _ = tensors["x"].shape
    return [b * T for b in range(B + 1)]


def _histories(tensors: Tensors, N_seq: int) -> torch.Tensor:
    """[N_seq,W-1,D]: what stands before each sequence."""
    D, W = tensors["weight"].shape
    if "conv_state" in tensors:
        old = tensors["conv_state"][tensors["state_indices"].long(), : W - 1]
        return old * tensors["has_initial_state"][:, None, None]
    return tensors.get("initial_state", tensors["x"].new_zeros(N_seq, W - 1, D))


def _pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    _, T, D, W = (case.dims[key] for key in ("B", "T", "D", "W"))
    rows, bounds, pool = tensors["x"].view(-1, D), _bounds(tensors), tensors.get("conv_state")
    slots = tensors["state_indices"].tolist() if pool is not None else []
    rows_each, written = max(1, common.CHUNK // D), []
    for n, history in enumerate(_histories(tensors, len(bounds) - 1)):
        begin, end = bounds[n], bounds[n + 1]
        for start in range(begin, end, rows_each):
            stop = min(start + rows_each, end)
            before = torch.cat([history, rows[max(begin, start - W + 1) : start]])[1 - W :]
            expected = common.convolve(torch.cat([before, rows[start:stop]]), tensors)
            yield Piece("y", (start // T, slice(start % T, start % T + stop - start)), expected)
        final = torch.cat([history, rows[max(begin, end - W + 1) : end]])[1 - W :].double()
        if pool is None:
            yield Piece("final_state", n, final)
        elif begin < end:
            yield Piece("conv_state", slots[n], final)
            written.append(slots[n])
    if pool is not None:
        kept = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
        kept[written] = False
        yield Piece("conv_state", kept, pool[kept].double())


def _bytes(case: Case) -> int:
    B, T, D, W = (case.dims[key] for key in ("B", "T", "D", "W"))
    N_seq, options = len(_lengths(case)), case.options
    read = sum(n % 3 != 1 for n in range(N_seq)) if options.get("pool") else N_seq * bool(options.get("initial"))
    states = (read + N_seq) * (W - 1) * D
    integers = 4 * (N_seq + 1) * ("lengths" in options) + 5 * N_seq * bool(options.get("pool"))
    return (2 * B * T * D + states + D * (W + 1)) * getattr(torch, case.dtype).itemsize + integers


def _candidates(twin: str, statics: Mapping[str, int], dtype: str) -> list[Knobs]:
    if twin == "triton":
        return [
            {"BLOCK_SIZE_T": tokens, **launch}
            for tokens in (8, 16, 32, 64, 128)
            for launch in common.vector_launches(dtype, 2048)
        ]
    # TMA copies no more than 256 channels at a time. A thread has two at least, for as many tokens as there are taps, and
    # several tiles should have room beside each other in shared memory.
    return [
        {"BLOCK_SIZE_T": tokens, "BLOCK_SIZE_D": channels}
        for tokens in (4, 8, 16, 32, 64, 128)
        for channels in (64, 128, 256)
        if tokens * channels >= 1024 and tokens * channels * getattr(torch, dtype).itemsize <= 32768
    ]


def _states(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pool, slots and flags, also for a case without them: a state of its own for each sequence."""
    if "conv_state" in tensors:
        return tensors["conv_state"], tensors["state_indices"], tensors["has_initial_state"]
    history = _histories(tensors, len(_bounds(tensors)) - 1).clone()
    slots = torch.arange(len(history), dtype=torch.int32, device=history.device)
    return history, slots, torch.full_like(slots, "initial_state" in tensors, dtype=torch.bool)


def _vllm(function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, **scalars: Any) -> Callable[[], Any]:
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    bounds, (pool, slots, has_initial) = _bounds(tensors), _states(tensors)
    # It wants [D, tokens] and [S, D, W-1], both with dense channels: views of ours. Slot 0 is its padding unless told
    # otherwise; here every slot is live.
    arguments = {
        "query_start_loc": torch.tensor(bounds, dtype=torch.int32, device=x.device),
        "cache_indices": slots,
        "has_initial_state": has_initial,
        "null_block_id": -1,
        "metadata": common.vllm_metadata(bounds, x.device),
    }
    rows, states = x.flatten(0, 1).T, pool.transpose(1, 2)
    del out  # it allocates its own

    def call() -> Any:
        y = function(rows, weight, bias, states, activation="silu", **arguments).T.view(x.shape)
        return y if "conv_state" in tensors else {"y": y, "final_state": pool}

    return call


def _fla(function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, **scalars: Any) -> Callable[[], Any]:
    """It has no slots: with a pool its states lie in tensors of its own, gathered beforehand."""
    x, bounds, packed = tensors["x"], _bounds(tensors), {}
    has_states = "conv_state" in tensors or "initial_state" in tensors
    state = common.fla_state(_histories(tensors, len(bounds) - 1)) if has_states else None
    if "cu_seqlens" in tensors:
        chunks = torch.tensor(common.blocks(bounds, common.FLA_BLOCK), device=x.device)
        packed = {"cu_seqlens": tensors["cu_seqlens"].long(), "chunk_indices": chunks}
    arguments = {"bias": tensors["bias"], "residual": None, "initial_state": state, **packed}
    del out

    def call() -> dict[str, torch.Tensor]:
        y, final = function(x, tensors["weight"], output_final_state=True, activation="silu", **arguments)
        return {"y": y} if "conv_state" in tensors else {"y": y, "final_state": final[..., 1:].transpose(1, 2)}

    return call


def _dao(function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, **scalars: Any) -> Callable[[], Any]:
    x, state = tensors["x"].transpose(1, 2), tensors.get("initial_state")
    arguments = {"initial_states": None if state is None else state.transpose(1, 2), "return_final_states": True}
    del out

    def call() -> dict[str, torch.Tensor]:
        y, final = function(x, tensors["weight"], tensors["bias"], activation="silu", **arguments)
        return {"y": y.transpose(1, 2), "final_state": final.transpose(1, 2)}

    return call


def _is_narrow(case: Case) -> bool:
    return case.dims["W"] <= 4


CAUSAL_CONV1D = BenchOp(
    spec=SPECS["causal_conv1d"],
    positional=("x", "weight"),
    scalars=lambda case: {"activation": "silu"},
    output="x",
    mutated=("conv_state",),
    fresh=("final_state",),
    exact=("conv_state", "final_state"),
    # Powers of four at 8192 channels, and 8192 tokens of 5376 and 10240.
    sizes=tuple(sorted((*(1 << power for power in range(18, 31, 2)), 8192 * 5376, 8192 * 10240))),
    # a few blocks, what a step of serving holds, streaming
    first_sizes=(1 << 20, 8192 * 10240, 1 << 28),
    grid={"width": (4,)},
    sweeps={
        "one-T": _over_tokens("one sequence", _ONE),
        "four-T": _over_tokens("four packed sequences", _FOUR),
        "dense-T": _over_tokens("dense, no state", ()),
        "one-D": _over_channels("one sequence", _ONE),
        "four-D": _over_channels("four packed sequences", _FOUR),
    },
    run_dtypes=("bfloat16",),
    dtype_field="dtype",
    case=_case,
    table_key=_table_key,
    single=_single,
    operands=_operands,
    pieces=_pieces,
    bytes_moved=_bytes,
    flops=lambda case: common.flops(case.dims["B"] * case.dims["T"] * case.dims["D"], case.dims["W"]),
    candidates=_candidates,
    peers=(
        Peer("vllm", "vllm.model_executor.layers.mamba.ops.causal_conv1d", "causal_conv1d_fn", _vllm, _is_narrow),
        Peer("fla", "fla.modules.causal_conv1d", "causal_conv1d", _fla, autotunes=True),
        # what FLA_CONV_GLUON=1 selects
        Peer(
            "fla_gluon", "fla.modules.causal_conv1d.backends.gluon", "causal_conv1d_fwd_gluon", _fla, _is_narrow
        ),
        # seq_idx, its packed form, knows no states
        Peer(
            "causal_conv1d", "causal_conv1d", "causal_conv1d_fn", _dao,
            lambda case: _is_narrow(case) and "lengths" not in case.options,
        ),
    ),
)  # fmt: skip
