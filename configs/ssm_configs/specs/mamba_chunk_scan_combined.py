"""Tuning tables of `mamba_chunk_scan_combined`: which path, and how a sequence is cut into pieces that run in parallel."""

from collections.abc import Mapping

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics, Value

# Tokens of the fused path's own chunk: the cheapest in tensor work, whatever the caller's chunk is.
CHUNK = 64
_SMS = 132

_FUSED = Knob("FUSED", bool, "the fused path (False: the five stages one after another)")
_PIECE = Knob("CHUNKS_PER_PIECE", range(1, 65537), "chunks of 64 tokens that one program scans; pieces run in parallel")
_STATES = Knob(
    "STATES_PER_PIECE", (1, 2, 4, 8), "programs that share the end state of a piece (as many as divide its chunks)"
)
_STAGES = Knob("num_stages", (2, 3, 4), "chunks on their way into shared memory")

_KNOBS = (_FUSED, _PIECE, _STATES, _STAGES)


def pallas_rule(shared: Mapping[str, Value], statics: Statics) -> Knobs:
    """The same path and the same pieces; the Mosaic kernel has one thread block an SM and room for four stages."""
    del statics
    return {"FUSED": shared["FUSED"], "CHUNKS_PER_PIECE": shared["CHUNKS_PER_PIECE"], "num_stages": 4}


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """Two pieces of work for every SM, counting all heads: one wave of two thread blocks an SM."""
    del device
    pieces = max(1, 2 * _SMS // statics["nheads"])
    chunks = -(-size // CHUNK)
    piece = min(max(1, -(-chunks // pieces)), 65536)
    return {"FUSED": dtype != "float32", "CHUNKS_PER_PIECE": piece, "STATES_PER_PIECE": 1, "num_stages": 2}


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
    pallas_knobs=(_FUSED, _PIECE, _STAGES),
    pallas_rule=pallas_rule,
    heuristic=heuristic,
    tuned_at=("B", "T"),
    vllm_compatible=False,
)
