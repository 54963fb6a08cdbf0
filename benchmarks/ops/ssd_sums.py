"""Two stages of the chunked SSD scan, each by itself: the sums of steps within chunks, and the states from chunk to chunk."""

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

# -- chunk_cumsum


def _cumsum_operands(case: Case) -> dict[str, Operand]:
    B, T, H = dims(case, "B", "T", "H")
    slow = bool(case.options.get("slow"))
    return {
        "dt": Operand((B, T, H), case.dtype, common.normal),
        "A": Operand((H,), "float32", partial(common.decay_rate, slow=slow)),
        "dt_bias": Operand((H,), "float32", partial(common.step_bias, slow=slow)),
        **_stages.bounds(case),
    }


def _cumsum_pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    A, bias = tensors["A"].double(), tensors["dt_bias"].double()
    for chunk in _stages.places(case)[1]:
        # logaddexp, because torch's own softplus is linear beyond 20
        dt = torch.logaddexp(tensors["dt"][chunk.b, chunk.begin : chunk.end].double() + bias, A.new_zeros(())).T
        dt = torch.nn.functional.pad(dt, (0, case.dims["L"] - dt.shape[1]))
        yield Piece("dt", (chunk.b, slice(None), chunk.slot), dt)
        yield Piece("dA_cumsum", (chunk.b, slice(None), chunk.slot), (dt * A[:, None]).cumsum(1))
    yield from without_meaning(case, ("dt", "dA_cumsum"), heads_first=True)


def _cumsum_bytes(case: Case) -> int:
    """dt, A and the bias once, both results of chunks that there are."""
    H, L = dims(case, "H", "L")
    return H * (tokens(case) * _stages.width(case) + 8 + len(_stages.places(case)[1]) * L * 8)


def _cumsum_candidates(twin: str, statics: Statics, dtype: str) -> list[Knobs]:
    """4 to 32 elements a thread."""
    found = product(BLOCK_SIZE_H=(4, 8, 16, 32), BLOCK_SIZE_T=(64, 128, 256), num_warps=(2, 4, 8))
    found = [
        knobs
        for knobs in found
        if knobs["BLOCK_SIZE_T"] <= max(64, statics["chunk_size"])
        and 4 <= knobs["BLOCK_SIZE_H"] * knobs["BLOCK_SIZE_T"] / (32 * knobs["num_warps"]) <= 32
    ]
    return rule_first("ssd_chunk_cumsum", statics, dtype, found)


SSD_CHUNK_CUMSUM = common.stage(
    "ssd.chunk_cumsum",
    per_token="",
    positional=("dt", "A"),
    scalars=lambda case: {"chunk_size": case.dims["L"], "dt_softplus": True},
    grid={"nheads": (80, 128), "chunk_size": (128, 256)},
    operands=_cumsum_operands,
    pieces=_cumsum_pieces,
    bytes_moved=_cumsum_bytes,
    # bias, softplus (exp, log, sum), product, sum
    flops=lambda case: 6 * tokens(case) * case.dims["H"],
    candidates=_cumsum_candidates,
    peers=peers.CHUNK_CUMSUM,
)


# -- state_passing


def _passing_operands(case: Case) -> dict[str, Operand]:
    B, H, P, N = dims(case, "B", "H", "P", "N")
    operands = {
        "states": Operand((B, _stages.places(case)[0], H, P, N), "float32", common.normal),
        "dA_cumsum": common.chunked(case)["dA_cumsum"],
    }
    if case.options.get("initial"):
        operands["initial_states"] = Operand((_stages.sequences(case), H, P, N), "float32", common.normal)
    return operands | _stages.bounds(case)


def _passing_pieces(case: Case, tensors: Tensors) -> Iterator[Piece]:
    states, a = tensors["states"], tensors["dA_cumsum"]
    for n, found in enumerate(_stages.by_sequence(case)):
        state = torch.zeros(states.shape[2:], dtype=torch.float64, device=states.device)
        if "initial_states" in tensors:
            state += tensors["initial_states"][n]
        for chunk in found:
            yield Piece("before", (chunk.b, chunk.slot), state)
            decay = a[chunk.b, :, chunk.slot, -1].double().exp()
            state = state * decay[:, None, None] + states[chunk.b, chunk.slot]
        yield Piece("final", n, state)
    yield from without_meaning(case, ("before",))


def _passing_bytes(case: Case) -> int:
    """Every chunk's state in and out, with its decay; the final states, and the initial ones if there are any."""
    H, P, N = dims(case, "H", "P", "N")
    ends = _stages.sequences(case) * (2 if case.options.get("initial") else 1)
    return 4 * H * (len(_stages.places(case)[1]) * (2 * P * N + 1) + ends * P * N)


def _passing_candidates(twin: str, statics: Statics, dtype: str) -> list[Knobs]:
    """One or two accesses of 16 bytes a thread and chunk."""
    found = [
        {"BLOCK_SIZE": 128 * warps * accesses, "num_warps": warps, "num_stages": stages}
        for warps in (1, 2, 4, 8)
        for accesses in (1, 2)
        for stages in (1, 2, 4)
    ]
    return rule_first("ssd_state_passing", statics, dtype, found)


SSD_STATE_PASSING = common.stage(
    "ssd.state_passing",
    per_token="states",
    fp32=True,
    positional=("states", "dA_cumsum"),
    scalars=lambda case: {},
    grid={"headdim": (64,), "dstate": (128,)},
    operands=_passing_operands,
    pieces=_passing_pieces,
    bytes_moved=_passing_bytes,
    flops=lambda case: 2 * len(_stages.places(case)[1]) * case.dims["H"] * case.dims["P"] * case.dims["N"],
    candidates=_passing_candidates,
    peers=peers.STATE_PASSING,
)
