"""The three stages of the chunked SSD scan that multiply, each by itself, on operands as the stages before leave them."""

import math
from collections.abc import Iterator
from functools import partial

import torch

from parity_tests.cases import Case
from ssm_configs.spec import Knobs, Statics

from ..op import Operand, Piece, Tensors
from . import _ssd as common
from . import _ssd_peers as peers
from . import _stages
from ._ssd import dims, tokens
from ._stages import product, rule_first, without_meaning

# -- chunk_state


def _state_operands(case: Case) -> dict[str, Operand]:
    B, T, H, G, P, N = dims(case, "B", "T", "H", "G", "P", "N")
    return {
        "x": Operand((B, T, H, P), case.dtype, common.normal),
        "B": Operand((B, T, G, N), case.dtype, common.normal),
        **common.chunked(case),
        **_stages.bounds(case),
    }


def _state_pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    H, G = case.dims["H"], case.dims["G"]
    for chunk in _stages.places(case)[1]:
        length = chunk.end - chunk.begin
        a, dt = (tensors[name][chunk.b, :, chunk.slot].double() for name in ("dA_cumsum", "dt"))
        weight = ((a[:, -1:] - a).clamp_(max=0).exp_() * dt)[:, :length, None]
        x, B = (_stages.of_chunk(tensors[name], chunk) for name in ("x", "B"))
        state = (x * weight).transpose(1, 2) @ B.repeat_interleave(H // G, 0)
        yield Piece("states", (chunk.b, chunk.slot), state)
    yield from without_meaning(case, ("states",))


def _state_bytes(case: Case) -> int:
    """x, B, dt, dA_cumsum once, and the states."""
    H, G, P, N, L = dims(case, "H", "G", "P", "N", "L")
    chunks = len(_stages.places(case)[1])
    return tokens(case) * (H * P + G * N) * _stages.width(case) + chunks * H * (8 * L + 4 * P * N)


def _state_candidates(twin: str, statics: Statics, dtype: str) -> list[Knobs]:
    """Tiles of whole tensor-core rows; loops of more than one step with as many stages as can be under way."""
    P, N, L = (statics[key] for key in ("headdim", "dstate", "chunk_size"))
    if dtype == "float32":
        found = product(BLOCK_SIZE_M=(32, 64), BLOCK_SIZE_N=(32, 64), BLOCK_SIZE_K=(16, 32), num_warps=(4, 8))
        return rule_first("ssd_chunk_state", statics, dtype, [{**knobs, "num_stages": 1} for knobs in found])
    loops = [(32, 2), (32, 3), (64, 1), (64, 2), (128, 1)]
    found = [
        {**knobs, "BLOCK_SIZE_K": K, "num_warps": warps, "num_stages": stages}
        for knobs in product(BLOCK_SIZE_M=(32, 64, 128), BLOCK_SIZE_N=(64, 128, 256))
        for K, stages in loops
        for warps in (4, 8)
        if knobs["BLOCK_SIZE_M"] <= max(32, P) and knobs["BLOCK_SIZE_N"] <= max(64, N) and K <= L
        # A thread holds its share of the state.
        if 8 <= knobs["BLOCK_SIZE_M"] * knobs["BLOCK_SIZE_N"] / (32 * warps) <= 64
    ]
    return rule_first("ssd_chunk_state", statics, dtype, found)


SSD_CHUNK_STATE = common.stage(
    "ssd.chunk_state",
    per_token="H",
    positional=("x", "B", "dt", "dA_cumsum"),
    scalars=lambda case: {},
    grid={"headdim": (64,), "dstate": (128,), "chunk_size": (128, 256)},
    operands=_state_operands,
    pieces=_state_pieces,
    bytes_moved=_state_bytes,
    flops=lambda case: 2 * tokens(case) * case.dims["H"] * case.dims["P"] * case.dims["N"],
    candidates=_state_candidates,
    peers=peers.CHUNK_STATE,
)


# -- bmm_chunk


def _bmm_operands(case: Case) -> dict[str, Operand]:
    shape = tuple(dims(case, "B", "T", "G", "N"))
    tokens = {name: Operand(shape, case.dtype, common.normal) for name in ("C", "B")}
    return tokens | _stages.bounds(case)


def _bmm_pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    L = case.dims["L"]
    for chunk in _stages.places(case)[1]:
        C, B = (_stages.of_chunk(tensors[name], chunk) for name in ("C", "B"))
        short = L - C.shape[1]
        products = torch.nn.functional.pad(C @ B.transpose(1, 2), (0, short, 0, short))
        yield Piece("CB", (chunk.b, chunk.slot), products)
    yield from without_meaning(case, ("CB",))


def _bmm_bytes(case: Case) -> int:
    G, N, L = dims(case, "G", "N", "L")
    return G * (2 * tokens(case) * N * _stages.width(case) + 4 * len(_stages.places(case)[1]) * L * L)


def _bmm_candidates(twin: str, statics: Statics, dtype: str) -> list[Knobs]:
    N, L = statics["dstate"], statics["chunk_size"]
    if dtype == "float32":
        found = product(BLOCK_SIZE_M=(32, 64), BLOCK_SIZE_N=(32, 64), BLOCK_SIZE_K=(16, 32), num_warps=(4, 8))
        return rule_first("ssd_bmm_chunk", statics, dtype, found)
    found = product(
        BLOCK_SIZE_M=(32, 64, 128), BLOCK_SIZE_N=(64, 128, 256), BLOCK_SIZE_K=(64, 128), num_warps=(4, 8)
    )  # fmt: skip
    found = [
        knobs
        for knobs in found
        if knobs["BLOCK_SIZE_N"] <= max(64, L)
        and knobs["BLOCK_SIZE_K"] <= max(64, N)
        and 8 <= knobs["BLOCK_SIZE_M"] * knobs["BLOCK_SIZE_N"] / (32 * knobs["num_warps"]) <= 128
    ]
    return rule_first("ssd_bmm_chunk", statics, dtype, found)


SSD_BMM_CHUNK = common.stage(
    "ssd.bmm_chunk",
    per_token="G",
    positional=("C", "B"),
    scalars=lambda case: {"chunk_size": case.dims["L"]},
    grid={"dstate": (128,), "chunk_size": (128, 256)},
    operands=_bmm_operands,
    pieces=_bmm_pieces,
    bytes_moved=_bmm_bytes,
    flops=lambda case: 2 * tokens(case) * case.dims["G"] * case.dims["L"] * case.dims["N"],
    candidates=_bmm_candidates,
    peers=peers.BMM_CHUNK,
)


# -- chunk_scan


def _products(tensor: torch.Tensor, generator: torch.Generator, N: int) -> None:
    """As large as sums of N products are."""
    common.normal(tensor, generator)
    tensor.mul_(math.sqrt(N))


def _scan_operands(case: Case) -> dict[str, Operand]:
    B, T, H, G, P, N, L = dims(case, "B", "T", "H", "G", "P", "N", "L")
    NC = _stages.places(case)[0]
    operands = {
        "CB": Operand((B, NC, G, L, L), "float32", partial(_products, N=N)),
        "x": Operand((B, T, H, P), case.dtype, common.normal),
        **common.chunked(case),
        "C": Operand((B, T, G, N), case.dtype, common.normal),
        "states": Operand((B, NC, H, P, N), "float32", common.normal),
    }
    if case.options.get("D"):
        operands["D"] = Operand((H,), "float32", common.normal)
    return operands | _stages.bounds(case)


def _scan_pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    H, G = case.dims["H"], case.dims["G"]
    for chunk in _stages.places(case)[1]:
        live = slice(chunk.end - chunk.begin)
        a, dt = (tensors[name][chunk.b, :, chunk.slot, live].double() for name in ("dA_cumsum", "dt"))
        x, C = (_stages.of_chunk(tensors[name], chunk) for name in ("x", "C"))
        scores = tensors["CB"][chunk.b, chunk.slot, :, live, live].double().repeat_interleave(H // G, 0)
        decay = (a[:, :, None] - a[:, None, :]).clamp_(max=0).exp_()
        state = tensors["states"][chunk.b, chunk.slot].double()
        y = scores.mul_(decay).mul_(dt[:, None, :]).tril_() @ x
        y += (C.repeat_interleave(H // G, 0) @ state.transpose(1, 2)) * a.exp()[:, :, None]
        if "D" in tensors:
            y += tensors["D"].double()[:, None, None] * x
        yield Piece("y", (chunk.b, slice(chunk.begin, chunk.end)), y.transpose(0, 1))


def _scan_bytes(case: Case) -> int:
    """x, y, C, dt, dA_cumsum, the states, and of CB the pairs that count."""
    H, G, P, N, L = dims(case, "H", "G", "P", "N", "L")
    chunk = H * (8 * L + 4 * P * N) + 4 * G * (L * (L + 1) // 2)
    skip = 4 * H if case.options.get("D") else 0
    return tokens(case) * (2 * H * P + G * N) * _stages.width(case) + len(_stages.places(case)[1]) * chunk + skip


def _scan_candidates(twin: str, statics: Statics, dtype: str) -> list[Knobs]:
    """Around the written rule: few tokens a step, dstate in parts or whole."""
    P, N, L = (statics[key] for key in ("headdim", "dstate", "chunk_size"))
    if dtype == "float32":
        found = product(
            BLOCK_SIZE_M=(32, 64), BLOCK_SIZE_N=(32, 64), BLOCK_SIZE_K=(16,), BLOCK_SIZE_DSTATE=(16, 32),
            num_warps=(4, 8), num_stages=(1,),
        )  # fmt: skip
        return rule_first("ssd_chunk_scan", statics, dtype, found)
    found = [
        {**knobs, "num_warps": warps, "num_stages": stages}
        for knobs in product(
            BLOCK_SIZE_M=(64, 128), BLOCK_SIZE_N=(32, 64, 128), BLOCK_SIZE_K=(32, 64), BLOCK_SIZE_DSTATE=(32, 128)
        )
        for warps, stages in ((4, 1), (4, 2), (8, 1), (8, 2))
        if knobs["BLOCK_SIZE_M"] <= max(64, L)
        and min(64, P) <= knobs["BLOCK_SIZE_N"] <= max(32, P)
        and knobs["BLOCK_SIZE_DSTATE"] <= max(32, N)
        # A thread holds its share of y.
        and 16 <= knobs["BLOCK_SIZE_M"] * knobs["BLOCK_SIZE_N"] / (32 * warps) <= 64
    ]
    return rule_first("ssd_chunk_scan", statics, dtype, found)


SSD_CHUNK_SCAN = common.stage(
    "ssd.chunk_scan",
    per_token="H",
    positional=("CB", "x", "dt", "dA_cumsum", "C", "states"),
    scalars=lambda case: {},
    output="x",
    grid={"headdim": (64,), "dstate": (128,), "chunk_size": (128, 256)},
    operands=_scan_operands,
    pieces=_scan_pieces,
    bytes_moved=_scan_bytes,
    # the causal half of the products with x, and the state's
    flops=lambda case: tokens(case) * case.dims["H"] * case.dims["P"] * (case.dims["L"] + 2 * case.dims["N"]),
    candidates=_scan_candidates,
    peers=peers.CHUNK_SCAN,
)
