"""`selective_state_update` the way serving calls it: one token a sequence, tied dt and A, slots in random order."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from parity_tests.cases import Case
from ssm_configs import SPECS
from ssm_configs.spec import Knobs

from ..op import BenchOp, Operand, Piece, Sweep, Tensors, point_name
from ..peers import Peer

_SPEC = SPECS["selective_state_update"]
# float64 elements that the reference holds at a time; it needs a handful of such tensors.
_CHUNK = 1 << 26
_SWEPT = {"headdim": 64, "dstate": 128}


def _case(size: int, statics: Mapping[str, int], dtype: str) -> Case:
    """The (B, H) pair behind a table key: heads first, up to the 128 of the large models, then batch."""
    H = min(size, 128)
    if size % H:
        raise ValueError(f"size: expected at most 128 or a multiple of 128, got {size}")
    B, G = size // H, 8 if H % 8 == 0 else 1
    dims = {"S": B, "B": B, "H": H, "G": G, "P": statics["headdim"], "N": statics["dstate"]}
    options = {"D": True, "dt_bias": True, "dt_softplus": True, "slots": True}
    return Case("selective_state_update", point_name("E", size), dims, "bfloat16", dtype, options)


def _table_key(case: Case) -> tuple[int, dict[str, int]]:
    return case.dims["B"] * case.dims["H"], {"headdim": case.dims["P"], "dstate": case.dims["N"]}


def _single(case: Case) -> Case:
    return replace(case.with_dims(S=1, B=1), name="single")


def _normal(tensor: torch.Tensor, generator: torch.Generator) -> None:
    for part in tensor.view(-1).split(1 << 28):
        part.normal_(generator=generator)


def _decay_rate(tensor: torch.Tensor, generator: torch.Generator) -> None:
    tensor.uniform_(1, 16, generator=generator).neg_()


def _step_bias(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Mamba-2's initialisation: softplus(dt_bias) is log-uniform in [1e-3, 1e-1]."""
    step = tensor.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
    tensor.copy_(step + torch.log(-torch.expm1(-step)))


def _operands(case: Case) -> dict[str, Operand]:
    S, B, H, G, P, N = (case.dims[key] for key in ("S", "B", "H", "G", "P", "N"))

    def slots(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.copy_(torch.randperm(S, generator=generator, device=tensor.device)[:B])

    return {
        "state": Operand((S, H, P, N), case.state_dtype, _normal),
        "x": Operand((B, H, P), case.dtype, _normal),
        "dt": Operand((B, H), case.dtype, _normal),
        "A": Operand((H,), "float32", _decay_rate),
        "B": Operand((B, G, N), case.dtype, _normal),
        "C": Operand((B, G, N), case.dtype, _normal),
        "D": Operand((H,), "float32", _normal),
        "dt_bias": Operand((H,), "float32", _step_bias),
        "state_batch_indices": Operand((B,), "int32", slots),
    }


def _pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    B, H, G, P, N = (case.dims[key] for key in ("B", "H", "G", "P", "N"))
    slots = tensors["state_batch_indices"].long()
    A, D, dt_bias = (tensors[name].double() for name in ("A", "D", "dt_bias"))
    rows_each = max(1, _CHUNK // (H * P * N))
    for rows in (slice(start, min(start + rows_each, B)) for start in range(0, B, rows_each)):
        x, dt, B_, C = (tensors[name][rows].double() for name in ("x", "dt", "B", "C"))
        B_, C = (group.repeat_interleave(H // G, dim=1) for group in (B_, C))
        # logaddexp, because torch's own softplus is linear beyond 20
        dt = torch.logaddexp(dt + dt_bias, torch.zeros_like(dt))
        state = tensors["state"][slots[rows]].double()
        state *= torch.exp(A * dt)[:, :, None, None]
        state += (dt[:, :, None] * x)[:, :, :, None] * B_[:, :, None, :]
        yield Piece("y", rows, torch.matmul(state, C[:, :, :, None])[..., 0] + D[:, None] * x)
        yield Piece("state", slots[rows], state)
    spare = torch.ones(case.dims["S"], dtype=torch.bool, device=slots.device)
    spare[slots] = False
    unused = spare.nonzero()[:, 0]
    for start in range(0, len(unused), rows_each):
        kept = unused[start : start + rows_each]
        yield Piece("state", kept, tensors["state"][kept].double())


def _bytes(case: Case) -> int:
    B, H, G, P, N = (case.dims[key] for key in ("B", "H", "G", "P", "N"))
    width, state_width = (getattr(torch, dtype).itemsize for dtype in (case.dtype, case.state_dtype))
    state = 2 * B * H * P * N * state_width
    activations = (2 * B * H * P + B * H + 2 * B * G * N) * width  # x and y, dt, B and C
    parameters = 3 * H * 4  # A, D, dt_bias
    return state + activations + parameters + 4 * B  # slots


def _flops(case: Case) -> int:
    """A state element costs decay, outer product, their sum, and a multiply-add into y; a row dt·x, D·x and their sum."""
    B, H, P, N = (case.dims[key] for key in ("B", "H", "P", "N"))
    return B * H * P * (5 * N + 3)


def _candidates(twin: str, statics: Mapping[str, int], dtype: str) -> list[Knobs]:
    P, N = statics["headdim"], statics["dstate"]
    if twin == "triton":
        columns = 1 << (N - 1).bit_length()
        # Registers bound a tile from above, idle threads from below.
        return [
            {"BLOCK_SIZE_M": rows, "num_warps": warps}
            for rows in (4, 8, 16, 32, 64, 128)
            for warps in (1, 2, 4, 8)
            if rows <= 1 << (P - 1).bit_length() and 1 <= rows * columns / (32 * warps) <= 256
        ]
    # A block is one warpgroup: its 4 warps take equal rows, its 128 threads 16 bytes at a time. By TMA its tiles lie in
    # shared memory, and should leave room for blocks beside it; they are a part of a head's or all of some heads'. Without
    # TMA they lie in registers, where one large tile is as good as several.
    row_bytes = N * getattr(torch, dtype).itemsize
    return [
        {"BLOCK_SIZE_M": rows, "tiles_per_block": tiles, "use_tma": use_tma}
        for rows in range(4, P + 1, 4)
        for use_tma in (True, False)
        for tiles in (1, 2, 4, 8)
        if P % rows == 0
        and (P // rows % tiles == 0 or tiles % (P // rows) == 0)
        and rows * row_bytes >= 128 * 16
        and (rows * tiles * row_bytes <= 48 * 1024 if use_tma else rows * tiles * N / 128 <= (64 if tiles == 1 else 16))
    ]


def _vllm(
    function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, **scalars: Any
) -> Callable[[], torch.Tensor]:
    arguments = _expanded(tensors)

    def call() -> torch.Tensor:
        # Slot 0 is vLLM's padding unless told otherwise; here every slot is live.
        function(
            *(arguments[name] for name in ("state", "x", "dt", "A", "B", "C", "D", "dt_bias")),
            dt_softplus=True,
            state_batch_indices=arguments["state_batch_indices"],
            null_block_id=-1,
            out=out,
        )
        return out

    return call


def _mamba_ssm(
    function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, **scalars: Any
) -> Callable[[], torch.Tensor]:
    arguments = _expanded(tensors)
    del out  # it allocates its own

    def call() -> torch.Tensor:
        return function(
            *(arguments[name] for name in ("state", "x", "dt", "A", "B", "C")),
            D=arguments["D"],
            dt_bias=arguments["dt_bias"],
            dt_softplus=True,
            state_batch_indices=arguments["state_batch_indices"],
        )

    return call


def _expanded(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Per-head numbers as views with stride 0, which is how the mixers pass them and what selects the tied kernels."""
    _, H, P, N = tensors["state"].shape
    expanded = {name: tensors[name][:, None].expand(H, P) for name in ("D", "dt_bias")}
    expanded["A"] = tensors["A"][:, None, None].expand(H, P, N)
    expanded["dt"] = tensors["dt"][:, :, None].expand(-1, H, P)
    return {**tensors, **expanded}


SELECTIVE_STATE_UPDATE = BenchOp(
    spec=_SPEC,
    positional=("state", "x", "dt", "A", "B", "C"),
    scalars=lambda case: {"dt_softplus": True},
    output="x",
    mutated=("state",),
    # vLLM's keys
    sizes=(
        8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 12288, 16384, 24576, 32768, 49152, 65536, 98304, 131072,
        196608, 262144,
    ),
    # below one wave of blocks, a few waves, streaming
    first_sizes=(64, 1024, 16384),
    grid={"headdim": (64, 80, 128), "dstate": (16, 64, 128, 256)},
    sweeps={"E": Sweep((128, 512, 1024, 4096, 8192, 16384, 65536, 131072), lambda E, dtype: _case(E, _SWEPT, dtype))},
    run_dtypes=("float32", "bfloat16", "float16"),
    dtype_field="state_dtype",
    quoted_as="ssu",
    quoted_statics=_SWEPT,
    case=_case,
    table_key=_table_key,
    single=_single,
    operands=_operands,
    pieces=_pieces,
    bytes_moved=_bytes,
    flops=_flops,
    candidates=_candidates,
    peers=(
        Peer("vllm", "vllm.model_executor.layers.mamba.ops.mamba_ssm", "selective_state_update", _vllm),
        Peer("mamba_ssm", "mamba_ssm.ops.triton.selective_state_update", "selective_state_update", _mamba_ssm),
    ),
)  # fmt: skip
