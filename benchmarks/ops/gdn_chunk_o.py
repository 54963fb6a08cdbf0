"""`gdn.chunk_o`, the last of the gated delta rule's stages: the outputs of all chunks at once, from the states before them."""

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
from ..peers import Peer
from . import _gdn as common
from ._stages import places

_SPEC = SPECS["gdn_chunk_o"]
_KNOWN = ("lengths", "initial", "slow")
# Elements of states that the reference holds in float64 at a time.
_CHUNK = 1 << 26


def _chunk_o(name: str, T: int, model: GDNDims, dtype: str = "bfloat16", B: int = 1, **options: Any) -> Case:
    return Case("gdn.chunk_o", name, common.dims(model, T, B), dtype, "float32", options)


def _case(size: int, statics: Mapping[str, int], dtype: str) -> Case:
    """Qwen3-Next's heads."""
    if size % common.WIDE.H_v:
        raise ValueError(f"size: expected a multiple of {common.WIDE.H_v} value heads, got {size}")
    T = size // common.WIDE.H_v
    model = replace(common.WIDE, K=statics["K"], V=statics["V"])
    case = _chunk_o(point_name("T", T), T, model, "bfloat16" if dtype == "float16" else dtype)
    return case.with_dims(L=statics["chunk_size"])


def _sweep(line: str, model: GDNDims, sizes: tuple[int, ...], B: int = 1, packed: bool = False) -> Sweep:
    def case(T: int, dtype: str) -> Case:
        return _chunk_o(
            point_name("T", T, line), T, model, dtype, B, **({"lengths": common.packed(T)} if packed else {})
        )

    return Sweep(sizes, case)


def _table_key(case: Case) -> tuple[int, dict[str, int]]:
    size = case.dims["B"] * case.dims["T"] * case.dims["H_v"]
    return size, {"K": case.dims["K"], "V": case.dims["V"], "chunk_size": case.dims["L"]}


def _single(case: Case) -> Case:
    if "lengths" in case.options:
        lengths = (8,) * len(case.options["lengths"])
        return replace(case.with_dims(T=sum(lengths)), name="single", options={**case.options, "lengths": lengths})
    return replace(case.with_dims(B=1, T=64), name="single")


def _gate(tensor: torch.Tensor, generator: torch.Generator, case: Case) -> None:
    common.decay(tensor, generator, slow=bool(case.options.get("slow")))
    tensor.copy_(common.within_chunks(tensor, case))


def _operands(case: Case) -> dict[str, Operand]:
    common.check_options(case, _KNOWN)
    B, T, H_v, K, V = (case.dims[key] for key in ("B", "T", "H_v", "K", "V"))
    return common.tokens(case) | {
        "h": Operand((B, places(case)[0], H_v, K, V), case.dtype, common.normal),
        "g": Operand((B, T, H_v), "float32", partial(_gate, case=case)),
    }


def _pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    H_k, H_v, K, L = (case.dims[key] for key in ("H_k", "H_v", "K", "L"))
    causal = torch.ones(L, L, dtype=torch.bool, device=tensors["v"].device).tril()
    for chunk in places(case)[1]:
        rows, length = slice(chunk.begin, chunk.end), chunk.end - chunk.begin
        q, k = (tensors[name][chunk.b, rows].double().transpose(0, 1) for name in ("q", "k"))
        g, v = tensors["g"][chunk.b, rows].double().T, tensors["v"][chunk.b, rows].double().transpose(0, 1)
        decay = (g[:, :, None] - g[:, None, :]).masked_fill_(~causal[:length, :length], -math.inf).exp_()
        products = (q @ k.transpose(1, 2)).repeat_interleave(H_v // H_k, 0)
        carried = q.repeat_interleave(H_v // H_k, 0) @ tensors["h"][chunk.b, chunk.slot].double()
        o = (g.exp()[:, :, None] * carried + (products * decay) @ v) * K**-0.5
        yield Piece("y", (chunk.b, rows), o.transpose(0, 1))


def _bytes(case: Case) -> int:
    """q, k, v, o and the states of chunks that there are once, and the fp32 gate."""
    B, T, H_k, H_v, K, V = (case.dims[key] for key in ("B", "T", "H_k", "H_v", "K", "V"))
    width = getattr(torch, case.dtype).itemsize
    states = len(places(case)[1]) * H_v * K * V * width
    return B * T * (2 * (H_k * K + H_v * V) * width + 4 * H_v) + states


def _flops(case: Case) -> int:
    """Whole tiles: q with the state, q with k, and both products with v."""
    B, T, H_v, K, V, L = (case.dims[key] for key in ("B", "T", "H_v", "K", "V", "L"))
    return 2 * B * T * H_v * (K * V + L * (K + V))


def _candidates(twin: str, statics: Mapping[str, int], dtype: str) -> list[Knobs]:
    K, V = (max(16, 1 << (statics[name] - 1).bit_length()) for name in ("K", "V"))
    if dtype == "float32":
        blocks = [(16, 16), (32, 16), (16, 32), (32, 32)]
        warps_of, heads_of, stages_of = (4, 8), (1,), (1,)
    else:
        blocks = [(k, v) for k in (64, 128, 256) for v in (32, 64, 128) if k <= max(64, K) and v <= max(32, V)]
        warps_of, heads_of, stages_of = (2, 4, 8), (1, 2), (1, 2)
    common_knobs: list[Knobs] = [
        {"BLOCK_SIZE_K": k, "BLOCK_SIZE_V": v, "HEADS": heads, "num_stages": stages}
        for k, v in blocks
        for heads in heads_of
        for stages in stages_of
        if heads > 1 or stages == 1  # one head has no loop
    ]
    if twin == "pallas":
        return [knobs for knobs in common_knobs if knobs["BLOCK_SIZE_K"] == min(blk for blk, _ in blocks)]
    # A thread holds its share of the output and of the products.
    L = statics["chunk_size"]
    return [
        {**knobs, "num_warps": warps}
        for knobs in common_knobs
        for warps in warps_of
        if (knobs["BLOCK_SIZE_V"] + L) * L / (32 * warps) <= 256
    ]


def _packed_states(tensors: Tensors, chunk_size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """h with only those slots in which a chunk stands, as theirs are, and what they know packed sequences by."""
    packed, h = common.chunk_indices(tensors, chunk_size), tensors["h"]
    if not packed:
        return h, packed
    first = packed["cu_seqlens"] // chunk_size + torch.arange(len(packed["cu_seqlens"]), device=h.device)
    sequence, chunk = packed["chunk_indices"].unbind(1)
    return h[:, first[sequence] + chunk], packed


def _fla(
    function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, *, chunk_size: int, **scalars: Any
) -> Callable[[], Any]:
    """Its gates are in powers of two."""
    del out, scalars  # it allocates its own
    h, packed = _packed_states(tensors, chunk_size)
    q, k, v, g = (tensors[name] for name in ("q", "k", "v", "g"))
    g = g / math.log(2)
    return lambda: {"y": function(q, k, v, h, g=g, chunk_size=chunk_size, **packed)}


def _vllm(
    function: Callable[..., Any], tensors: Tensors, out: torch.Tensor, *, chunk_size: int, **scalars: Any
) -> Callable[[], Any]:
    """Its states are [V,K]."""
    del scalars
    h, packed = _packed_states(tensors, chunk_size)
    h = common.swapped(h)
    q, k, v, g = (tensors[name] for name in ("q", "k", "v", "g"))
    flat = out.view(-1)
    return lambda: {"y": function(q, k, v, h, g=g, chunk_size=chunk_size, core_attn_out=flat, **packed).view(out.shape)}


def _is_16_bit(case: Case) -> bool:
    return case.dtype != "float32"


_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)

GDN_CHUNK_O = BenchOp(
    spec=_SPEC,
    positional=("q", "k", "v", "h"),
    scalars=lambda case: {"chunk_size": case.dims["L"]},
    output="v",
    mutated=(),
    sizes=tuple(32 * tokens for tokens in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)),
    # less than a wave of blocks, some waves, streaming
    first_sizes=(32 * 512, 32 * 8192, 32 * 32768),
    grid={"K": (128,), "V": (128,), "chunk_size": (64,)},
    tuned_dtypes=("float16",),
    untuned={"pallas": "its kernel's launch follows from the shape alone"},
    sweeps={
        "H32": _sweep("Qwen3-Next (H_k=16, H_v=32)", common.WIDE, _TOKENS),
        "H8": _sweep("Qwen3.5-397B/TP8 (H_k=2, H_v=8)", common.NARROW, _TOKENS),
        "H32-four": _sweep("Qwen3-Next, four sequences of", common.WIDE, (1024, 2048, 4096, 8192), B=4),
        "H32-packed": _sweep("Qwen3-Next, four packed sequences", common.WIDE, _TOKENS, packed=True),
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
        common.VllmPeer("vllm", "chunk_o", "chunk_fwd_o", _vllm, _is_16_bit, autotunes=True),
        Peer("fla", "fla.ops.common.chunk_o", "chunk_fwd_o", _fla, _is_16_bit, autotunes=True),
    ),
)  # fmt: skip
