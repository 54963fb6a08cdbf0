"""Tuning tables of `mamba_chunk_scan_combined`: which path, and how a sequence is cut into pieces that run in parallel."""

from collections.abc import Mapping
from dataclasses import replace

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics, Value

# Tokens of the fused path's own chunk: the cheapest in tensor work, whatever the caller's chunk is.
CHUNK = 64
_SMS = 132
# More chunks than a sequence has.
_WHOLE = 65536

_FUSED = Knob("FUSED", bool, "the fused path (False: the five stages one after another)")
_PIECE = Knob("CHUNKS_PER_PIECE", range(1, 65537), "chunks of 64 tokens that one program scans; pieces run in parallel")
_STATES = Knob(
    "STATES_PER_PIECE", (1, 2, 4, 8), "programs that share the end state of a piece (as many as divide its chunks)"
)
_HEADS = Knob(
    "HEADS_PER_BLOCK", (1, 2), "heads of a group that one thread block scans, if the group has an even number"
)
# Pallas' tables that are older than a knob mean 1.
_SINCE = (replace(_HEADS, default=1), replace(_STATES, legal=range(1, 9), default=1))
_STAGES = Knob("num_stages", (2, 3, 4), "chunks on their way into shared memory, as many as fit")

_KNOBS = (_FUSED, _PIECE, _STATES, _HEADS, _STAGES)


def pallas_rule(shared: Mapping[str, Value], statics: Statics) -> Knobs:
    """The same path; the same pieces where one a head would leave half of the SMs idle, else none.

    A Mosaic thread block has one head and an SM to itself, with room for four stages. On an H200, 80 heads of 8192 tokens took
    144 µs whole and 166 µs in three pieces each; 16 heads 39 µs in eight.
    """
    blocks = statics["nheads"] * -(-statics["headdim"] // 64)
    piece = shared["CHUNKS_PER_PIECE"] if 2 * blocks <= _SMS else _WHOLE
    once = {"HEADS_PER_BLOCK": 1, "STATES_PER_PIECE": 1}
    return {"FUSED": shared["FUSED"], "CHUNKS_PER_PIECE": piece, "num_stages": 4} | once


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """The cheaper of one and two heads a thread block, each with as many pieces as fill one wave of one thread block an SM.

    Costs are microseconds on an H200 with headdim 64 and dstate 128: a chunk of one head takes 1.09, of two heads 1.93; states
    of pieces 4 and 0.0035 for each chunk of each head, and up to 5 to string them together.
    """
    del device
    H, chunks = statics["nheads"], max(1, -(-size // CHUNK))
    costs = {}
    for heads, chunk_us in ((1, 1.09), (2, 1.93)):
        blocks = -(-H // heads)
        piece = -(-chunks // max(1, _SMS // blocks))
        pieces = -(-chunks // piece)
        costs[heads] = (chunk_us * piece * -(-blocks * pieces // _SMS), pieces, piece)
        if pieces > 1:
            states_us = 4 + 0.0035 * H * piece * (pieces - 1) + min(5.0, 0.7 * (pieces - 1))
            costs[heads] = (costs[heads][0] + states_us, pieces, piece)
    heads = min(costs, key=lambda heads: costs[heads])
    _, pieces, piece = costs[heads]
    states = 1
    while pieces > 1 and states < 8 and 2 * states * (pieces - 1) * -(-H // 2) <= _SMS:
        states *= 2
    return {
        "FUSED": dtype != "float32",
        "CHUNKS_PER_PIECE": min(piece, 65536),
        "STATES_PER_PIECE": states,
        "HEADS_PER_BLOCK": heads,
        "num_stages": 4,
    }


MAMBA_CHUNK_SCAN_COMBINED = OpSpec(
    name="mamba_chunk_scan_combined",
    static_keys=("nheads", "headdim", "dstate"),
    dtype_key="dtype",
    dtypes=("float16", "float32"),
    # Only the width of an element matters to the launch.
    dtype_aliases={"bfloat16": "float16"},
    # Of all sequences; nheads: those on this device, after tensor parallelism.
    size_key="tokens",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=(_FUSED, _PIECE, *_SINCE, _STAGES),
    pallas_rule=pallas_rule,
    heuristic=heuristic,
    tuned_at=("B", "T"),
    vllm_compatible=False,
)
