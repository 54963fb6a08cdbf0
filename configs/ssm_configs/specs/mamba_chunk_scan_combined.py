"""Tuning tables of `mamba_chunk_scan_combined`: which path, and how a sequence is cut into pieces that run in parallel."""

from collections.abc import Mapping
from dataclasses import replace

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics, Value

# Tokens of the fused path's own chunk: the cheapest in tensor work, whatever the caller's chunk is.
CHUNK = 64
_SMS = 132
# How much less two heads a thread block have to cost.
_BY_FAR = 1.07
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
    """The cheapest cut by the costs of `_cost_us`, with one head a thread block unless two are cheaper by far.

    Pallas takes the pieces but has one head a block whatever is asked for: pieces that are cut for two leave it twice the
    blocks.
    """
    del device
    tiles = -(-statics["headdim"] // 64)
    chunks = max(1, -(-size // CHUNK))
    # Pieces of equal length, up to some that are two waves of one-head blocks.
    pieces = {
        -(-chunks // count) for count in range(1, 1 + min(chunks, max(1, 2 * _SMS // (statics["nheads"] * tiles))))
    }
    costs = {
        heads: min(
            (_cost_us(statics["nheads"], tiles, chunks, piece, states, heads), piece, states)
            for piece in pieces
            for states in ((1, 2, 4, 8) if piece < chunks else (1,))
            if states <= piece
        )
        for heads in (1, 2)
    }
    cut_on_pallas = 2 * statics["nheads"] * tiles <= _SMS
    heads = 2 if (_BY_FAR if cut_on_pallas else 1) * costs[2][0] < costs[1][0] else 1
    _, piece, states = costs[heads]
    return {
        "FUSED": dtype != "float32",
        "CHUNKS_PER_PIECE": min(piece, _WHOLE),
        "STATES_PER_PIECE": states,
        "HEADS_PER_BLOCK": heads,
        "num_stages": 4,
    }


def _cost_us(nheads: int, tiles: int, chunks: int, piece: int, states: int, heads: int) -> float:
    """What a cut takes: microseconds on an H200 of one sequence with headdim 64 and dstate 128.

    A start, and for every wave of one thread block an SM another and its chunks; where there are pieces, a kernel before it
    for the states that they leave, and every such state on its way through memory.
    """
    pieces = -(-chunks // piece)
    waves = -(-(-(-nheads // heads) * tiles * pieces) // _SMS)
    us = 7.2 + 5 * (waves - 1) + waves * ({1: 1.0, 2: 1.8}[heads] * piece + 1.3 * (heads - 1))
    if pieces > 1:
        ends = -(-nheads // 2) * tiles * (pieces - 1) * states
        us += 3.7 + 0.68 * -(-piece // states) * -(-ends // _SMS)
        us += 0.7 * pieces * states + 0.0093 * nheads * tiles * (pieces - 1) * states
    return us


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
