"""The stages of the gated delta rule but the last, each by itself, on operands as the stages before leave them."""

from collections.abc import Iterator

import torch

from parity_tests.cases import Case
from ssm_configs.spec import Knobs, Statics

from ..op import Operand, Piece, Tensors
from . import _gdn as draws
from . import _gdn_peers as peers
from . import _gdn_stages as common
from . import _stages
from ._stages import product, rule_first


def _dims(case: Case, *names: str) -> list[int]:
    draws.check_options(case, ("lengths", "initial", "slow"))
    return [case.dims[name] for name in names]


def _tokens(case: Case) -> int:
    return case.dims["B"] * case.dims["T"]


def _share(elements: int, knobs: Knobs) -> float:
    """Of one thread. Bounds on it are where compilers for sm_90 begin to spill registers."""
    return elements / (32 * knobs["num_warps"])


# -- chunk_local_cumsum


def _cumsum_operands(case: Case) -> dict[str, Operand]:
    _dims(case)
    return {"g": common.raw_gates(case), **_stages.bounds(case)}


def _cumsum_pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    for chunk in _stages.places(case)[1]:
        rows = slice(chunk.begin, chunk.end)
        yield Piece("g", (chunk.b, rows), tensors["g"][chunk.b, rows].double().cumsum(0))


def _cumsum_candidates(twin: str, statics: Statics, dtype: str) -> list[Knobs]:
    """One to 16 elements a thread."""
    found = product(BLOCK_SIZE_H=(1, 2, 4, 8, 16, 32), num_warps=(1, 2, 4, 8))
    L = statics["chunk_size"]
    found = [knobs for knobs in found if 1 <= _share(knobs["BLOCK_SIZE_H"] * L, knobs) <= 16]
    return rule_first("gdn_chunk_local_cumsum", statics, dtype, found)


GDN_CHUNK_LOCAL_CUMSUM = common.stage(
    "gdn.chunk_local_cumsum",
    fp32=True,
    positional=("g",),
    scalars=lambda case: {"chunk_size": case.dims["L"]},
    operands=_cumsum_operands,
    pieces=_cumsum_pieces,
    bytes_moved=lambda case: 8 * _tokens(case) * case.dims["H_v"],
    flops=lambda case: _tokens(case) * case.dims["H_v"],
    candidates=_cumsum_candidates,
    peers=peers.CHUNK_LOCAL_CUMSUM,
)


# -- chunk_scaled_dot_kkt


def _kkt_operands(case: Case) -> dict[str, Operand]:
    _dims(case)
    return {**common.keys(case), "beta": common.strengths(case), "g": common.gates(case), **_stages.bounds(case)}


def _kkt_pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    L = case.dims["L"]
    for chunk in _stages.places(case)[1]:
        A = common.triangle(*(_stages.of_chunk(tensors[name], chunk) for name in ("k", "beta", "g")))
        A = torch.nn.functional.pad(A, (0, L - A.shape[-1]))
        yield Piece("A", (chunk.b, slice(chunk.begin, chunk.end)), A.transpose(0, 1))


def _kkt_bytes(case: Case) -> int:
    """k, beta and g once, A once."""
    H_k, H_v, K, L = _dims(case, "H_k", "H_v", "K", "L")
    return _tokens(case) * (H_k * K * _stages.width(case) + H_v * (8 + 4 * L))


def _kkt_candidates(twin: str, statics: Statics, dtype: str) -> list[Knobs]:
    K = max(16, 1 << (statics["K"] - 1).bit_length())
    if dtype == "float32":
        found = product(BLOCK_SIZE_K=(16, 32), num_warps=(4, 8))
    else:
        found = product(BLOCK_SIZE_K=(32, 64, 128, 256), num_warps=(1, 2, 4, 8))
        found = [
            knobs
            for knobs in found
            if knobs["BLOCK_SIZE_K"] <= max(32, K) and _share(statics["chunk_size"] ** 2, knobs) <= 64
        ]
    return rule_first("gdn_chunk_scaled_dot_kkt", statics, dtype, found)


GDN_CHUNK_SCALED_DOT_KKT = common.stage(
    "gdn.chunk_scaled_dot_kkt",
    positional=("k", "beta"),
    scalars=lambda case: {"chunk_size": case.dims["L"]},
    operands=_kkt_operands,
    pieces=_kkt_pieces,
    bytes_moved=_kkt_bytes,
    # whole tiles, one a key head; a difference, an exp and two products for every pair of a value head
    flops=lambda case: _tokens(case) * case.dims["L"] * (2 * case.dims["H_k"] * case.dims["K"] + 4 * case.dims["H_v"]),
    candidates=_kkt_candidates,
    peers=peers.CHUNK_SCALED_DOT_KKT,
)


# -- solve_tril


def _solve_operands(case: Case) -> dict[str, Operand]:
    _dims(case)
    return {"A": common.triangles(case, inverted=False, dtype="float32"), **_stages.bounds(case)}


def _solve_pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    L = case.dims["L"]
    for chunk in _stages.places(case)[1]:
        A = _stages.of_chunk(tensors["A"], chunk)[..., : chunk.end - chunk.begin]
        inverse = torch.nn.functional.pad(common.inverse(A.tril(-1)), (0, L - A.shape[-1]))
        yield Piece("inverse", (chunk.b, slice(chunk.begin, chunk.end)), inverse.transpose(0, 1))


def _solve_bytes(case: Case) -> int:
    """Of A what is below the diagonal, all of the inverse."""
    H_v, L = _dims(case, "H_v", "L")
    return 4 * _tokens(case) * H_v * ((L - 1) // 2 + L)


def _solve_candidates(twin: str, statics: Statics, dtype: str) -> list[Knobs]:
    found = product(num_warps=(1, 2, 4, 8), use_tma=(False, True))
    found = [knobs for knobs in found if _share(statics["chunk_size"] ** 2, knobs) <= 32]
    return rule_first("gdn_solve_tril", statics, dtype, found)


GDN_SOLVE_TRIL = common.stage(
    "gdn.solve_tril",
    fp32=True,
    positional=("A",),
    scalars=lambda case: {},
    operands=_solve_operands,
    pieces=_solve_pieces,
    bytes_moved=_solve_bytes,
    # forward substitution: a third of L^3 multiply-adds a chunk, halved for the zeros above the diagonal
    flops=lambda case: _tokens(case) * case.dims["H_v"] * case.dims["L"] ** 2 // 3,
    candidates=_solve_candidates,
    peers=peers.SOLVE_TRIL,
)


# -- recompute_w_u


def _w_u_operands(case: Case) -> dict[str, Operand]:
    _dims(case)
    return {
        **common.keys(case),
        "v": common.values(case),
        "beta": common.strengths(case),
        "A": common.triangles(case, inverted=True, dtype=case.dtype),
        "g": common.gates(case),
        **_stages.bounds(case),
    }


def _w_u_pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    for chunk in _stages.places(case)[1]:
        k, v, beta, A, g = (_stages.of_chunk(tensors[name], chunk) for name in ("k", "v", "beta", "A", "g"))
        for name, made in zip(
            ("w", "u"), common.w_u(k, v, beta, A[..., : chunk.end - chunk.begin], g), strict=True
        ):  # fmt: skip
            yield Piece(name, (chunk.b, slice(chunk.begin, chunk.end)), made.transpose(0, 1))


def _w_u_bytes(case: Case) -> int:
    """k, v, beta, g and of the inverse what is on the diagonal and below once; w and u."""
    H_k, H_v, K, V, L = _dims(case, "H_k", "H_v", "K", "V", "L")
    return _tokens(case) * ((H_k * K + H_v * (K + 2 * V + (L + 1) // 2)) * _stages.width(case) + 8 * H_v)


def _w_u_candidates(twin: str, statics: Statics, dtype: str) -> list[Knobs]:
    K, V = (max(16, 1 << (statics[name] - 1).bit_length()) for name in ("K", "V"))
    if dtype == "float32":
        found = product(BLOCK_SIZE_K=(16, 32), BLOCK_SIZE_V=(16, 32), num_warps=(8,))
    else:
        found = product(BLOCK_SIZE_K=(32, 64, 128), BLOCK_SIZE_V=(32, 64, 128), num_warps=(1, 2, 8))
        found = [
            knobs
            for knobs in found
            if knobs["BLOCK_SIZE_K"] <= max(32, K)
            and knobs["BLOCK_SIZE_V"] <= max(32, V)
            # Of both first blocks, which are there with a product and the inverse.
            and _share((knobs["BLOCK_SIZE_K"] + knobs["BLOCK_SIZE_V"]) * statics["chunk_size"], knobs) <= 96
        ]
    return rule_first("gdn_recompute_w_u", statics, dtype, found)


GDN_RECOMPUTE_W_U = common.stage(
    "gdn.recompute_w_u",
    positional=("k", "v", "beta", "A"),
    scalars=lambda case: {},
    operands=_w_u_operands,
    pieces=_w_u_pieces,
    bytes_moved=_w_u_bytes,
    flops=lambda case: 2 * _tokens(case) * case.dims["H_v"] * case.dims["L"] * (case.dims["K"] + case.dims["V"]),
    candidates=_w_u_candidates,
    peers=peers.RECOMPUTE_W_U,
)


# -- chunk_delta_h


def _delta_h_operands(case: Case) -> dict[str, Operand]:
    B, T, H_v, K, V = _dims(case, "B", "T", "H_v", "K", "V")
    operands = {
        **common.keys(case),
        # Both are drawn as what they are made of; `common.finish_w_u` makes them.
        "w": Operand((B, T, H_v, K), case.dtype, common.strengths(case).fill),
        "u": Operand((B, T, H_v, V), case.dtype, draws.normal),
        "g": common.gates(case),
    }
    if case.options.get("initial"):
        operands["initial_state"] = Operand((_stages.sequences(case), H_v, K, V), "float32", draws.normal)
    return operands | _stages.bounds(case)


def _delta_h_pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    H_k, H_v, K, V = (case.dims[key] for key in ("H_k", "H_v", "K", "V"))
    for n, found in enumerate(_stages.by_sequence(case)):
        state = torch.zeros(H_v, K, V, dtype=torch.float64, device=tensors["u"].device)
        if "initial_state" in tensors:
            state += tensors["initial_state"][n]
        for chunk in found:
            k, w, u, g = (_stages.of_chunk(tensors[name], chunk) for name in ("k", "w", "u", "g"))
            yield Piece("h", (chunk.b, chunk.slot), state)
            fresh = u - w @ state
            yield Piece("v_new", (chunk.b, slice(chunk.begin, chunk.end)), fresh.transpose(0, 1))
            left = (g[:, -1:] - g).exp()[:, :, None]
            k = k.repeat_interleave(H_v // H_k, 0).transpose(1, 2)
            state = state * g[:, -1].exp()[:, None, None] + k @ (left * fresh)
        yield Piece("final", n, state)
    yield from _stages.without_meaning(case, ("h",))


def _delta_h_bytes(case: Case) -> int:
    """k, w, u, g and v_new once, every chunk's state; the final states, and the initial ones if there are any."""
    H_k, H_v, K, V = _dims(case, "H_k", "H_v", "K", "V")
    ends = _stages.sequences(case) * (2 if case.options.get("initial") else 1)
    states = H_v * K * V * (len(_stages.places(case)[1]) * _stages.width(case) + 4 * ends)
    return _tokens(case) * ((H_k * K + H_v * (K + 2 * V)) * _stages.width(case) + 4 * H_v) + states


def _delta_h_candidates(twin: str, statics: Statics, dtype: str) -> list[Knobs]:
    K, V = (max(16, 1 << (statics[name] - 1).bit_length()) for name in ("K", "V"))
    L = statics["chunk_size"]
    if dtype == "float32":
        found = product(BLOCK_SIZE_V=(16, 32), num_warps=(4, 8), num_stages=(1,))
    else:
        found = [
            knobs
            for knobs in product(BLOCK_SIZE_V=(16, 32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3))
            if knobs["BLOCK_SIZE_V"] <= V
            # Of the fp32 state; k, w and u of every chunk under way are in shared memory.
            and 16 <= _share(K * knobs["BLOCK_SIZE_V"], knobs) <= 32
            and 2 * knobs["num_stages"] * L * (2 * K + knobs["BLOCK_SIZE_V"]) <= 200_000
        ]
    return rule_first("gdn_chunk_delta_h", statics, dtype, found)


GDN_CHUNK_DELTA_H = common.stage(
    "gdn.chunk_delta_h",
    per_token=False,
    positional=("k", "w", "u"),
    scalars=lambda case: {"chunk_size": case.dims["L"]},
    operands=_delta_h_operands,
    finish=common.finish_w_u,
    pieces=_delta_h_pieces,
    bytes_moved=_delta_h_bytes,
    flops=lambda case: 4 * _tokens(case) * case.dims["H_v"] * case.dims["K"] * case.dims["V"],
    candidates=_delta_h_candidates,
    peers=peers.CHUNK_DELTA_H,
)
