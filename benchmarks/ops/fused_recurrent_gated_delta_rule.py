"""`fused_recurrent_gated_delta_rule` the way serving calls it: one token a sequence, gates and norms in the kernel, slots."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from parity_tests.cases import Case
from parity_tests.cases_gdn import GDNDims
from ssm_configs import SPECS
from ssm_configs.spec import Knobs

from ..op import BenchOp, Operand, Piece, Sweep, Tensors, point_name
from ..peers import Peer
from . import _gdn as common

_SPEC = SPECS["fused_recurrent_gated_delta_rule"]
# float64 elements that the reference holds at a time; it needs a handful of such tensors.
_CHUNK = 1 << 26
_SERVED = {"slots": True, "gates": True, "l2norm": True}


def _decode(name: str, B: int, model: GDNDims, state_dtype: str) -> Case:
    # Slot 0 is nobody's, as in vLLM, whose kernels know it for padding.
    dims = {"S": B + 1, "B": B, "H_k": model.H_k, "H_v": model.H_v, "K": model.K, "V": model.V}
    return Case("fused_recurrent_gated_delta_rule", name, dims, "bfloat16", state_dtype, _SERVED)


def _case(size: int, statics: Mapping[str, int], dtype: str) -> Case:
    """Qwen3-Next's heads, or what a rank has of them; of what is more than all, sequences."""
    H_v = min(size, common.WIDE.H_v)
    if size % H_v or H_v % 2:
        raise ValueError(f"size: expected an even number up to 32 or a multiple of 32, got {size}")
    model = GDNDims("", H_v // 2, H_v, statics["K"], statics["V"])
    return _decode(point_name("states", size), size // H_v, model, dtype)


def _sweep(line: str, model: GDNDims) -> Sweep:
    return Sweep(
        (1, 8, 32, 64, 128, 256, 512, 1024),
        lambda B, dtype: _decode(point_name("B", B, line), B, model, dtype),
    )


def _table_key(case: Case) -> tuple[int, dict[str, int]]:
    return case.dims["B"] * case.dims["H_v"], {"K": case.dims["K"], "V": case.dims["V"]}


def _operands(case: Case) -> dict[str, Operand]:
    if any(not case.options.get(name) for name in _SERVED):
        raise ValueError(f"{case}: expected {', '.join(_SERVED)}, as serving has them")
    common.check_options(case, tuple(_SERVED))
    S, B, H_k, H_v, K, V = (case.dims[key] for key in ("S", "B", "H_k", "H_v", "K", "V"))

    def slots(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.copy_(torch.randperm(S - 1, generator=generator, device=tensor.device)[:B] + 1)

    return {
        "q": Operand((B, H_k, K), case.dtype, common.normal),
        "k": Operand((B, H_k, K), case.dtype, common.normal),
        "v": Operand((B, H_v, V), case.dtype, common.normal),
        "g": Operand((B, H_v), case.dtype, common.normal),
        "beta": Operand((B, H_v), case.dtype, common.normal),
        "state": Operand((S, H_v, K, V), case.state_dtype, common.normal),
        "A_log": Operand((H_v,), "float32", common.log_rate),
        "dt_bias": Operand((H_v,), "float32", common.step_bias),
        "state_indices": Operand((B,), "int32", slots),
    }


def _pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    B, H_k, H_v, K, V = (case.dims[key] for key in ("B", "H_k", "H_v", "K", "V"))
    slots = tensors["state_indices"].long()
    rate, bias = -tensors["A_log"].double().exp(), tensors["dt_bias"].double()
    rows_each = max(1, _CHUNK // (H_v * K * V))
    for rows in (slice(start, min(start + rows_each, B)) for start in range(0, B, rows_each)):
        q, k, v, g, beta = (tensors[name][rows].double() for name in ("q", "k", "v", "g", "beta"))
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        q, k = (x.repeat_interleave(H_v // H_k, 1)[..., None] for x in (q, k))  # [B,H_v,K,1]
        # logaddexp, because torch's own softplus is linear beyond 20
        decay = (rate * torch.logaddexp(g + bias, torch.zeros_like(g))).exp()
        state = tensors["state"][slots[rows]].double() * decay[:, :, None, None]
        fresh = beta.sigmoid()[:, :, None] * (v - (state * k).sum(2))
        state += k * fresh[:, :, None]
        yield Piece("y", rows, (state * q).sum(2) * K**-0.5)
        yield Piece("state", slots[rows], state)
    spare = torch.ones(case.dims["S"], dtype=torch.bool, device=slots.device)
    spare[slots] = False
    unused = spare.nonzero()[:, 0]
    for start in range(0, len(unused), rows_each):
        kept = unused[start : start + rows_each]
        yield Piece("state", kept, tensors["state"][kept].double())


def _bytes(case: Case) -> int:
    """The states twice; q, k, v and o, the raw gate and beta once; A_log, dt_bias and slots."""
    B, H_k, H_v, K, V = (case.dims[key] for key in ("B", "H_k", "H_v", "K", "V"))
    width, state_width = (getattr(torch, dtype).itemsize for dtype in (case.dtype, case.state_dtype))
    activations = (2 * H_k * K + 2 * H_v * V + 2 * H_v) * width
    return B * (2 * H_v * K * V * state_width + activations + 4) + 2 * H_v * 4


def _flops(case: Case) -> int:
    """A state element costs its decay, and a multiply-add each with k, into the state and with q."""
    return 7 * case.dims["B"] * case.dims["H_v"] * case.dims["K"] * case.dims["V"]


def _candidates(twin: str, statics: Mapping[str, int], dtype: str) -> list[Knobs]:
    K, V = (1 << (statics[name] - 1).bit_length() for name in ("K", "V"))
    widths = [1 << power for power in range(2, 9) if 1 << power <= V]
    if twin == "pallas":
        return [{"BLOCK_SIZE_V": width} for width in widths if 8 <= K * width / 128 <= 256]
    # Registers bound a tile from above, idle threads from below.
    return [
        {"BLOCK_SIZE_V": width, "num_warps": warps}
        for width in widths
        for warps in (1, 2, 4, 8)
        if 4 <= K * width / (32 * warps) <= 128
    ]


def _pool(tensors: Tensors) -> torch.Tensor:
    """A copy of the states as [S,H_v,V,K]."""
    return tensors["state"].transpose(-1, -2).contiguous()


def _vllm(function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, **scalars: Any) -> Callable[[], Any]:
    """One projection holds q, k and v, as the convolution leaves them. States are [V,K]."""
    del scalars  # its kernel does what serving does
    mixed = torch.cat([tensors[name].flatten(1) for name in ("q", "k", "v")], dim=1)
    pool, scale = _pool(tensors), tensors["k"].shape[-1] ** -0.5

    def call() -> dict[str, torch.Tensor]:
        function(
            mixed, tensors["g"], tensors["beta"], tensors["A_log"], tensors["dt_bias"], scale, pool, out[:, None],
            tensors["state_indices"], use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return {"y": out, "state": pool.transpose(-1, -2)}

    return call


def _fla(function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, **scalars: Any) -> Callable[[], Any]:
    """It has no slots: its states lie in a tensor of their own, gathered beforehand, and come out in another."""
    del out, scalars
    q, k, v, g, beta = (tensors[name][:, None] for name in ("q", "k", "v", "g", "beta"))
    state = tensors["state"][tensors["state_indices"].long()]

    def call() -> dict[str, torch.Tensor]:
        y, _ = function(
            q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True, A_log=tensors["A_log"], dt_bias=tensors["dt_bias"], use_beta_sigmoid_in_kernel=True,
        )  # fmt: skip
        return {"y": y[:, 0]}

    return call


def _flashinfer(function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, **scalars: Any) -> Callable[[], Any]:
    """States are [V,K]."""
    del scalars
    q, k, v, g, beta = (tensors[name][:, None] for name in ("q", "k", "v", "g", "beta"))
    pool = _pool(tensors)

    def call() -> dict[str, torch.Tensor]:
        function(
            q, k, v, None, tensors["A_log"], g, tensors["dt_bias"], beta, output=out[:, None], use_qk_l2norm=True,
            initial_state=pool, initial_state_indices=tensors["state_indices"],
        )  # fmt: skip
        return {"y": out, "state": pool.transpose(-1, -2)}

    return call


def _is_square(case: Case) -> bool:
    return case.dims["K"] == case.dims["V"] == 128 and case.dtype == "bfloat16" and case.state_dtype != "float16"


FUSED_RECURRENT_GATED_DELTA_RULE = BenchOp(
    spec=_SPEC,
    positional=("q", "k", "v", "g", "beta", "state"),
    scalars=lambda case: {"sigmoid_beta": True, "use_qk_l2norm": True},
    output="v",
    mutated=("state",),
    sizes=(4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    # below one wave of blocks, a few waves, streaming
    first_sizes=(32, 512, 8192),
    grid={"K": (128,), "V": (128,)},
    sweeps={
        "H32": _sweep("Qwen3-Next (H_k=16, H_v=32)", common.WIDE),
        "H8": _sweep("Qwen3.5-397B/TP8 (H_k=2, H_v=8)", common.NARROW),
    },
    run_dtypes=("float32", "bfloat16"),
    dtype_field="state_dtype",
    case=_case,
    table_key=_table_key,
    single=lambda case: replace(case.with_dims(S=2, B=1), name="single"),
    operands=_operands,
    pieces=_pieces,
    bytes_moved=_bytes,
    flops=_flops,
    candidates=_candidates,
    peers=(
        common.VllmPeer("vllm", "fused_recurrent", "fused_recurrent_gated_delta_rule_packed_decode", _vllm),
        Peer("fla", "fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule", _fla),
        Peer(
            "flashinfer", "flashinfer.gdn_decode", "gated_delta_rule_decode_pretranspose", _flashinfer, _is_square
        ),
    ),
)  # fmt: skip
