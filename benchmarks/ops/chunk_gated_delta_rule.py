"""`chunk_gated_delta_rule` the way models call it: normalised queries and keys, fp32 gates, and the last states."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from parity_tests.cases import Case
from parity_tests.cases_gdn import GDNDims
from ssm_configs import SPECS
from ssm_configs.spec import Knobs

from ..op import BenchOp, Operand, Piece, Sweep, Tensors, point_name
from ..peers import XLA_TOKENS, Peer
from . import _gdn as common

_SPEC = SPECS["chunk_gated_delta_rule"]
# Tokens of a chunk of the float64 definition.
_CHUNK = 128
_KNOWN = ("lengths", "initial", "slow", "l2norm")
# Tokens of a tuned shape, and of the longest of its sequences.
_TUNED_TOKENS, _TUNED_LENGTH = 32768, 8192


def _chunked(name: str, T: int, model: GDNDims, dtype: str = "bfloat16", B: int = 1, **options: Any) -> Case:
    return Case("chunk_gated_delta_rule", name, common.dims(model, T, B), dtype, "float32", options)


def _case(size: int, statics: Mapping[str, int], dtype: str) -> Case:
    """Qwen3-Next's heads, or what a rank has of them; of what is more than all, batch rows."""
    H_v = min(size, common.WIDE.H_v)
    if size % H_v or H_v % 2:
        raise ValueError(f"size: expected an even number up to 32 or a multiple of 32, got {size}")
    B = size // H_v
    T = min(_TUNED_LENGTH, max(512, _TUNED_TOKENS // B))
    model = GDNDims("", H_v // 2, H_v, statics["K"], statics["V"])
    case = _chunked(point_name("states", size), T, model, "bfloat16" if dtype == "float16" else dtype, B)
    return case.with_dims(L=statics["chunk_size"])


def _sweep(line: str, model: GDNDims, sizes: tuple[int, ...], B: int = 1, packed: bool = False) -> Sweep:
    def case(T: int, dtype: str) -> Case:
        options = {"lengths": common.packed(T), "initial": True} if packed else {}
        return _chunked(point_name("T", T, line), T, model, dtype, B, **options)

    return Sweep(sizes, case)


def _table_key(case: Case) -> tuple[int, dict[str, int]]:
    size = common.sequences(case) * case.dims["H_v"]
    return size, {"K": case.dims["K"], "V": case.dims["V"], "chunk_size": case.dims["L"]}


def _single(case: Case) -> Case:
    # The number of states chooses the config, and stays; four chunks are enough for any loop.
    if "lengths" in case.options:
        lengths = (256,) + (8,) * (len(case.options["lengths"]) - 1)
        return replace(case.with_dims(T=sum(lengths)), name="single", options={**case.options, "lengths": lengths})
    return replace(case.with_dims(T=256), name="single")


def _operands(case: Case) -> dict[str, Operand]:
    common.check_options(case, _KNOWN)
    B, T, H_v, K, V = (case.dims[key] for key in ("B", "T", "H_v", "K", "V"))
    operands = common.tokens(case) | {
        "g": Operand((B, T, H_v), "float32", partial(common.decay, slow=bool(case.options.get("slow")))),
        "beta": Operand((B, T, H_v), "float32", common.strength),
    }
    if case.options.get("initial"):
        operands["initial_state"] = Operand((common.sequences(case), H_v, K, V), "float32", common.normal)
    return operands


def _pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    """With the state S before a chunk, (I + A)·fresh = beta·(v - exp(a)·k·S), a the sum of g; solved, not inverted."""
    H_k, H_v, K, V = (case.dims[key] for key in ("H_k", "H_v", "K", "V"))
    device = tensors["v"].device
    causal = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=device).tril()
    for n, (b, begin, end) in enumerate(common.bounds(case)):
        S = torch.zeros(H_v, K, V, dtype=torch.float64, device=device)
        if "initial_state" in tensors:
            S += tensors["initial_state"][n]
        for start in range(begin, end, _CHUNK):
            rows = slice(start, min(start + _CHUNK, end))
            within = causal[: rows.stop - start, : rows.stop - start]
            q, k = (tensors[name][b, rows].double().transpose(0, 1) for name in ("q", "k"))  # [H_k,l,K]
            if case.options.get("l2norm"):
                q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
            kk, qk = ((x @ k.transpose(1, 2)).repeat_interleave(H_v // H_k, 0) for x in (k, q))
            q, k = (x.repeat_interleave(H_v // H_k, 0) for x in (q, k))
            v, beta = tensors["v"][b, rows].double().transpose(0, 1), tensors["beta"][b, rows].double().T[:, :, None]
            a = tensors["g"][b, rows].double().cumsum(0).T  # [H_v,l]
            decay = (a[:, :, None] - a[:, None, :]).masked_fill_(~within, -math.inf).exp_()
            since = a.exp()[:, :, None]
            A = (kk * decay * beta).tril_(-1)
            fresh = torch.linalg.solve_triangular(A, beta * (v - since * (k @ S)), upper=False, unitriangular=True)
            o = (since * (q @ S) + (qk * decay) @ fresh) * K**-0.5
            yield Piece("y", (b, rows), o.transpose(0, 1))
            left = (a[:, -1:] - a).exp()[:, :, None]
            S = S * since[:, -1:] + k.transpose(1, 2) @ (left * fresh)
        yield Piece("final", n, S)


def _bytes(case: Case) -> int:
    """q, k, v and o once, fp32 g and beta, the final states, and the initial ones if there are any."""
    B, T, H_k, H_v, K, V = (case.dims[key] for key in ("B", "T", "H_k", "H_v", "K", "V"))
    states = common.sequences(case) * H_v * K * V * 4 * (2 if case.options.get("initial") else 1)
    return B * T * (2 * (H_k * K + H_v * V) * getattr(torch, case.dtype).itemsize + 8 * H_v) + states


def _flops(case: Case) -> int:
    """Five products of whole tiles with keys and values, and the two of a chunk's tokens with each other; no inverse."""
    B, T, H_v, K, V, L = (case.dims[key] for key in ("B", "T", "H_v", "K", "V", "L"))
    return B * T * H_v * (6 * K * V + 4 * L * (K + V))


def _candidates(twin: str, statics: Mapping[str, int], dtype: str) -> list[Knobs]:
    """The stages' own tables say how they run; of the path through them only the inverse's warps are left."""
    solves = (4, 8) if dtype == "float32" else (2, 4, 8)
    found: list[Knobs] = [{"FUSED": False, "HEADS": 2, "num_stages": 3, "kkt_num_warps": warps} for warps in solves]
    fits = statics["chunk_size"] == 64 and {statics["K"], statics["V"]} <= {64, 128}
    if dtype != "float32" and fits:
        found += [
            {"FUSED": True, "HEADS": heads, "num_stages": stages, "kkt_num_warps": 4}
            for heads in (1, 2)
            for stages in (2, 3, 4)
        ]
    names = {knob.name for knob in _SPEC.knobs_of(twin)}
    kept = [{name: value for name, value in knobs.items() if name in names} for knobs in found]
    return [knobs for i, knobs in enumerate(kept) if knobs not in kept[:i]]


def _results(out: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    y, final = out
    return {"y": y, "final": final}


def _arguments(tensors: Tensors) -> list[torch.Tensor]:
    return [tensors[name] for name in ("q", "k", "v", "g", "beta")]


def _fla(
    function: Callable[..., Any],
    tensors: Tensors,
    out: torch.Tensor,
    *,
    chunk_size: int,
    use_qk_l2norm: bool,
    **scalars: Any,
) -> Callable[[], Any]:
    del out, scalars  # it allocates its own
    arguments, packed = _arguments(tensors), common.chunk_indices(tensors, chunk_size)

    def call() -> dict[str, torch.Tensor]:
        return _results(function(
            *arguments, initial_state=tensors.get("initial_state"), output_final_state=True,
            use_qk_l2norm_in_kernel=use_qk_l2norm, **packed,
        ))  # fmt: skip

    return call


def _vllm(
    function: Callable[..., Any],
    tensors: Tensors,
    out: torch.Tensor,
    *,
    chunk_size: int,
    use_qk_l2norm: bool,
    **scalars: Any,
) -> Callable[[], Any]:
    """Its states are [V,K]."""
    del out, scalars  # a buffer for o is for one batch row
    arguments, packed = _arguments(tensors), common.chunk_indices(tensors, chunk_size)
    if packed:
        chunks = -(-packed["cu_seqlens"].diff() // chunk_size)
        packed["chunk_offsets"] = torch.nn.functional.pad(chunks.cumsum(0), (1, 0))
    state = common.swapped(tensors.get("initial_state"))

    def call() -> dict[str, torch.Tensor]:
        y, final = function(
            *arguments, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=use_qk_l2norm, **packed
        )
        return _results((y, final.transpose(-1, -2)))

    return call


def _flash_qla(
    function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, *, use_qk_l2norm: bool, **scalars: Any
) -> Callable[[], Any]:
    del out, scalars
    arguments = _arguments(tensors)
    packed = {"cu_seqlens": tensors["cu_seqlens"].long()} if "cu_seqlens" in tensors else {}

    def call() -> dict[str, torch.Tensor]:
        return _results(function(
            *arguments, initial_state=tensors.get("initial_state"), output_final_state=True,
            use_qk_l2norm_in_kernel=use_qk_l2norm, **packed,
        ))  # fmt: skip

    return call


def _flashinfer(function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, **scalars: Any) -> Callable[[], Any]:
    """Packed always, states [V,K]; it takes the decay itself, whose exp its callers leave to the kernel before."""
    del scalars
    q, k, v, g, beta = (tensor.flatten(0, 1) for tensor in _arguments(tensors))
    B, T, H_v, V = tensors["v"].shape
    ends = tensors.get("cu_seqlens", torch.arange(0, B * T + 1, T, device=v.device)).long()
    alpha, state = g.exp(), common.swapped(tensors.get("initial_state"))
    final = v.new_empty(len(ends) - 1, H_v, V, q.shape[-1], dtype=torch.float32)

    def call() -> dict[str, torch.Tensor]:
        function(
            q, k, v, g=alpha, beta=beta, initial_state=state, output_final_state=True, cu_seqlens=ends,
            output=out.flatten(0, 1), output_state=final,
        )  # fmt: skip
        return _results((out, final.transpose(-1, -2)))

    return call


def _maxtext(
    function: Callable[..., Any], arrays: Mapping[str, Any], *, chunk_size: int, use_qk_l2norm: bool, **scalars: Any
) -> Any:
    """Its layer repeats q and k for the value heads. It returns the last states to those who give first ones."""
    import jax.numpy as jnp

    del scalars
    q, k, v = (arrays[name] for name in "qkv")
    heads = v.shape[2] // k.shape[2]
    q, k = (jnp.repeat(array, heads, axis=2) for array in (q, k))
    initial = arrays.get("initial_state")
    if initial is None:
        initial = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), jnp.float32)
    return function(
        q, k, v, arrays["g"], arrays["beta"], chunk_size=chunk_size, initial_state=initial,
        use_qk_norm_in_gdn=use_qk_l2norm, compute_dtype=v.dtype,
    )  # fmt: skip


def _is_16_bit(case: Case) -> bool:
    return case.dtype != "float32" and case.dims["L"] == 64


def _is_square(case: Case) -> bool:
    return _is_16_bit(case) and case.dims["K"] == case.dims["V"] == 128


_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)

CHUNK_GATED_DELTA_RULE = BenchOp(
    spec=_SPEC,
    positional=("q", "k", "v", "g", "beta"),
    scalars=lambda case: {
        "chunk_size": case.dims["L"], "return_final_state": True, "use_qk_l2norm": bool(case.options.get("l2norm")),
    },
    output="v",
    mutated=(),
    fresh=("final",),
    sizes=(4, 8, 16, 32, 64, 128, 256, 512),
    # idle SMs, half of them busy, several waves
    first_sizes=(8, 32, 128),
    grid={"K": (128,), "V": (128,), "chunk_size": (64,)},
    untuned={"pallas": "its kernels' launches follow from the shape alone"},
    sweeps={
        "H32": _sweep("Qwen3-Next (H_k=16, H_v=32)", common.WIDE, _TOKENS),
        "H8": _sweep("Qwen3.5-397B/TP8 (H_k=2, H_v=8)", common.NARROW, _TOKENS),
        "H32-four": _sweep("Qwen3-Next, four sequences of", common.WIDE, (1024, 2048, 4096, 8192), B=4),
        "H32-packed": _sweep("Qwen3-Next, four packed and resumed sequences", common.WIDE, _TOKENS, packed=True),
        "H8-packed": _sweep("Qwen3.5-397B/TP8, four packed and resumed sequences", common.NARROW, _TOKENS, packed=True),
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
        common.VllmPeer("vllm", "chunk", "chunk_gated_delta_rule", _vllm, _is_16_bit, autotunes=True),
        # With FlashQLA installed it would be that, unless FLA_FLASH_QLA=0.
        Peer("fla", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", _fla, _is_16_bit, autotunes=True),
        Peer("flash_qla", "flash_qla", "chunk_gated_delta_rule", _flash_qla, _is_square, autotunes=True),
        Peer(
            "flashinfer", "flashinfer.gdn_prefill", "chunk_gated_delta_rule", _flashinfer,
            lambda case: _is_square(case) and not case.options.get("l2norm"),
        ),
        Peer(
            "maxtext", "maxtext.models.qwen3", "jax_chunk_gated_delta_rule", _maxtext,
            lambda case: "lengths" not in case.options and case.dims["B"] * case.dims["T"] <= XLA_TOKENS,
            framework="jax",
        ),
    ),
)  # fmt: skip
