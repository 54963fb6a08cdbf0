"""`mamba_chunk_scan_combined` the way models call it: from raw dt, with bias, softplus, D and the final states."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from parity_tests.cases import MAMBA2_MODELS, Case, Mamba2Dims
from ssm_configs import SPECS
from ssm_configs.spec import Knobs

from ..op import BenchOp, Operand, Piece, Sweep, Tensors, point_name
from ..peers import XLA_TOKENS, Peer
from . import _ssd as common

_SPEC = SPECS["mamba_chunk_scan_combined"]
# Tokens of a chunk of the float64 definition.
_CHUNK = 256
# In sixteenths of all tokens: sequences that end in the midst of any chunk or piece.
_FOUR = (1, 7, 3, 5)
_KNOWN = ("D", "lengths", "initial", "slow", "chunk_aligned")


def _scan(name: str, T: int, model: Mamba2Dims, dtype: str = "bfloat16", **options: Any) -> Case:
    dims = {"B": 1, "T": T, "H": model.H, "G": model.G, "P": model.P, "N": model.N, "L": model.chunk_size}
    return Case("mamba_chunk_scan_combined", name, dims, dtype, "float32", {"D": True} | options)


def _packed(T: int) -> dict[str, Any]:
    lengths = [T * part // 16 - 5 for part in _FOUR]
    lengths[-1] += T - sum(lengths)
    return {"lengths": tuple(lengths), "initial": True}


def _case(size: int, statics: Mapping[str, int], dtype: str) -> Case:
    """The model's shape that has these statics, or one like it."""
    H, P, N = statics["nheads"], statics["headdim"], statics["dstate"]
    G = next((model.G for model in MAMBA2_MODELS if (model.H, model.P, model.N) == (H, P, N)), 1)
    model = Mamba2Dims("", H, G, P, N, 128)
    return _scan(point_name("T", size), size, model, "bfloat16" if dtype == "float16" else dtype)


def _sweep(line: str, model: Mamba2Dims, tokens: tuple[int, ...], packed: bool = False) -> Sweep:
    def case(T: int, dtype: str) -> Case:
        return _scan(point_name("T", T, line), T, model, dtype, **(_packed(T) if packed else {}))

    return Sweep(tokens, case)


def _table_key(case: Case) -> tuple[int, dict[str, int]]:
    H, P, N = (case.dims[key] for key in ("H", "P", "N"))
    return case.dims["B"] * case.dims["T"], {"nheads": H, "headdim": P, "dstate": N}


def _single(case: Case) -> Case:
    # Long enough for a piece that is not its sequence's last: every kernel runs.
    if "lengths" in case.options:
        lengths = (8,) * (len(case.options["lengths"]) - 1) + (512,)
        return replace(case.with_dims(B=1, T=sum(lengths)), name="single", options={**case.options, "lengths": lengths})
    return replace(case.with_dims(B=1, T=512), name="single")


def _operands(case: Case) -> dict[str, Operand]:
    if unknown := [name for name, value in case.options.items() if value and name not in _KNOWN]:
        raise ValueError(f"{case}: {', '.join(unknown)} cannot be benchmarked")
    B, T, H, G, P, N = (case.dims[key] for key in ("B", "T", "H", "G", "P", "N"))
    lengths: tuple[int, ...] = case.options.get("lengths", ())
    slow = bool(case.options.get("slow"))

    def bounds(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.copy_(torch.tensor([0, *lengths]).cumsum(0))

    operands = {
        "x": Operand((B, T, H, P), case.dtype, common.normal),
        "dt": Operand((B, T, H), case.dtype, common.normal),
        "A": Operand((H,), "float32", partial(common.decay_rate, slow=slow)),
        "B": Operand((B, T, G, N), case.dtype, common.normal),
        "C": Operand((B, T, G, N), case.dtype, common.normal),
        "D": Operand((H,), "float32", common.normal),
        "dt_bias": Operand((H,), "float32", partial(common.step_bias, slow=slow)),
    }
    if case.options.get("initial"):
        operands["initial_states"] = Operand((len(lengths or [0] * B), H, P, N), "float32", common.normal)
    if lengths:
        operands["cu_seqlens"] = Operand((len(lengths) + 1,), "int32", bounds)
    return operands


def _bounds(tensors: Tensors) -> list[tuple[int, int, int]]:
    """(batch row, begin, end) of every sequence."""
    B, T = tensors["x"].shape[:2]
    if "cu_seqlens" in tensors:
        return [(0, begin, end) for begin, end in itertools.pairwise(tensors["cu_seqlens"].tolist())]
    return [(b, 0, T) for b in range(B)]


def _pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    H, G, P, N = (case.dims[key] for key in ("H", "G", "P", "N"))
    A, D, dt_bias = (tensors[name].double() for name in ("A", "D", "dt_bias"))
    causal = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=A.device).tril()
    for n, (b, begin, end) in enumerate(_bounds(tensors)):
        state = tensors["initial_states"][n].double() if "initial_states" in tensors else A.new_zeros(H, P, N)
        for start in range(begin, end, _CHUNK):
            rows = slice(start, min(start + _CHUNK, end))
            length = rows.stop - start
            x = tensors["x"][b, rows].double().transpose(0, 1)  # [H,l,P]
            group = [tensors[name][b, rows].double().transpose(0, 1) for name in ("B", "C")]  # [G,l,N]
            # logaddexp, because torch's own softplus is linear beyond 20
            dt = torch.logaddexp(tensors["dt"][b, rows].double() + dt_bias, A.new_zeros(())).T  # [H,l]
            a = (dt * A[:, None]).cumsum(1)
            B_, C = (tensor.repeat_interleave(H // G, 0) for tensor in group)
            scores = (group[1] @ group[0].transpose(1, 2)).repeat_interleave(H // G, 0)
            decay = (a[:, :, None] - a[:, None, :]).masked_fill_(~causal[:length, :length], -math.inf).exp_()
            y = (scores.mul_(decay).mul_(dt[:, None, :])) @ x
            y += (C @ state.transpose(1, 2)) * a.exp()[:, :, None] + D[:, None, None] * x
            yield Piece("y", (b, rows), y.transpose(0, 1))
            weighted = x * (dt * (a[:, -1:] - a).exp())[:, :, None]
            state = state * a[:, -1].exp()[:, None, None] + weighted.transpose(1, 2) @ B_
        yield Piece("final", n, state)


def _bytes(case: Case) -> int:
    """x, y, dt, B and C once, the final states, and the initial ones if there are any."""
    B, T, H, G, P, N = (case.dims[key] for key in ("B", "T", "H", "G", "P", "N"))
    n_seq = len(case.options.get("lengths", range(B)))
    states = n_seq * H * P * N * 4 * (2 if case.options.get("initial") else 1)
    return B * T * (2 * H * P + H + 2 * G * N) * getattr(torch, case.dtype).itemsize + states


def _flops(case: Case) -> int:
    """The causal half of C·Bᵀ and of its product with x in chunks of L, and each state's making and use."""
    B, T, H, G, P, N, L = (case.dims[key] for key in ("B", "T", "H", "G", "P", "N", "L"))
    return B * T * (G * L * N + H * P * (L + 4 * N))


def _candidates(twin: str, statics: Mapping[str, int], dtype: str) -> list[Knobs]:
    unfused: Knobs = {
        "FUSED": False, "CHUNKS_PER_PIECE": 1, "STATES_PER_PIECE": 1, "HEADS_PER_BLOCK": 1, "num_stages": 4
    }  # fmt: skip
    whole = 65536  # chunks: more than a sequence has
    pieces = (2, 4, 8, 11, 16, 22, 32, 43, 64, 128, 256, 512, whole)
    if twin == "triton":
        fused = [
            {
                "FUSED": True, "CHUNKS_PER_PIECE": chunks, "STATES_PER_PIECE": states, "HEADS_PER_BLOCK": heads,
                "num_stages": 4,
            }
            for chunks in pieces
            for states in ((1,) if chunks == whole else (1, 2, 4))
            for heads in (1, 2)
        ]  # fmt: skip
    else:
        # Two heads a block came to the same time on an H200, cut as finely as that takes.
        forms = [(chunks, 1, 1, depth) for chunks in pieces for depth in (3, 4)]
        forms += [(chunks, states, 2, 3) for chunks in (43, 64) for states in (1, 3)]
        fused = [
            {
                "FUSED": True, "CHUNKS_PER_PIECE": chunks, "STATES_PER_PIECE": states, "HEADS_PER_BLOCK": heads,
                "num_stages": depth,
            }
            for chunks, states, heads, depth in forms
        ]  # fmt: skip
    return [unfused] if dtype == "float32" else [*fused, unfused]


def _vllm(
    function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, *, chunk_size: int, **scalars: Any
) -> Callable[[], Any]:
    del scalars  # the two that are left it spells alike or never returns
    bounds = _bounds(tensors)
    device = out.device
    sequences, ends = [], [0]
    for n, (_, begin, end) in enumerate(bounds):
        for start in range(begin, end, chunk_size):
            sequences.append(n)
            ends.append(min(start + chunk_size, end))
    last = [len(sequences) - 1 - sequences[::-1].index(n) for n in range(len(bounds))]

    def integers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    arguments = {
        "cu_seqlens": integers([0, *(end for _, _, end in bounds)]), "cu_chunk_seqlens": integers(ends),
        "last_chunk_indices": integers(last), "seq_idx": integers(sequences),
    }  # fmt: skip
    x, dt, B, C = (tensors[name][0] for name in ("x", "dt", "B", "C"))

    def call() -> dict[str, torch.Tensor]:
        final = function(
            x, dt, tensors["A"], B, C, chunk_size, out=out[0], D=tensors["D"], dt_bias=tensors["dt_bias"],
            initial_states=tensors.get("initial_states"), dt_softplus=True, state_dtype=torch.float32, **arguments,
        )  # fmt: skip
        return {"y": out, "final": final}

    return call


def _mamba_ssm(
    function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, *, chunk_size: int, **scalars: Any
) -> Callable[[], Any]:
    del scalars, out  # it allocates its own

    def call() -> dict[str, torch.Tensor]:
        y, final = function(
            *(tensors[name] for name in ("x", "dt", "A", "B", "C")), chunk_size, D=tensors["D"],
            dt_bias=tensors["dt_bias"], dt_softplus=True, return_final_states=True,
            initial_states=tensors.get("initial_states"),
        )  # fmt: skip
        return {"y": y, "final": final}

    return call


def _bonsai(function: Callable[..., Any], arrays: Mapping[str, Any], *, chunk_size: int, **scalars: Any) -> Any:
    """Its layer hands over B and C for every head. Steps in fp32, as there: sums of decays in bf16 are of no use."""
    import jax.numpy as jnp

    del scalars
    heads = arrays["x"].shape[2] // arrays["B"].shape[2]
    B, C = (jnp.repeat(arrays[name], heads, axis=2) for name in "BC")
    initial = arrays.get("initial_states")
    y, final = function(
        arrays["x"], arrays["dt"].astype(jnp.float32), arrays["A"], B, C, chunk_size, arrays["D"], arrays["dt_bias"],
        0.0, math.inf, None if initial is None else initial[:, None], return_final_states=True,
    )  # fmt: skip
    return y.astype(arrays["x"].dtype), final


_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)

MAMBA_CHUNK_SCAN_COMBINED = BenchOp(
    spec=_SPEC,
    positional=("x", "dt", "A", "B", "C"),
    scalars=lambda case: {"chunk_size": case.dims["L"], "dt_softplus": True, "return_final_states": True},
    output="x",
    mutated=(),
    fresh=("final",),
    sizes=(256, 1024, 2048, 4096, 8192, 16384, 32768, 131072),
    first_sizes=(1024, 8192),
    grid={"nheads": (16, 32, 48, 64, 80, 128, 256), "headdim": (64,), "dstate": (128,)},
    sweeps={
        "H128": _sweep("Nemotron-H-8B (H=128, G=8)", common.NEMOTRON, _TOKENS),
        "H80": _sweep("Mamba2-2.7B (H=80, G=1)", common.MAMBA2, _TOKENS),
        "H16": _sweep("Nemotron-H-8B/TP8 (H=16, G=1)", common.NEMOTRON.slice(8), _TOKENS),
        "H128-packed": _sweep("Nemotron-H-8B, four packed and resumed sequences", common.NEMOTRON, _TOKENS, packed=True),
    },
    run_dtypes=("bfloat16",),
    dtype_field="dtype",
    case=_case,
    table_key=_table_key,
    single=_single,
    operands=_operands,
    pieces=_pieces,
    bytes_moved=_bytes,
    flops=_flops,
    candidates=_candidates,
    peers=(
        Peer(
            "vllm", "vllm.model_executor.layers.mamba.ops.ssd_combined", "mamba_chunk_scan_combined_varlen", _vllm,
            lambda case: case.dims["B"] == 1, autotunes=True,
        ),
        # Its packed form takes no initial states per sequence.
        Peer(
            "mamba_ssm", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", _mamba_ssm,
            lambda case: "lengths" not in case.options, autotunes=True,
        ),
        Peer(
            "bonsai", "bonsai.models.mamba2.modeling", "ssd_forward", _bonsai,
            lambda case: "lengths" not in case.options and case.dims["B"] * case.dims["T"] <= XLA_TOKENS,
            framework="jax",
        ),
    ),
)  # fmt: skip
