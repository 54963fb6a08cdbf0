"""Tuning tables of `ssd.chunk_cumsum`."""

from ..devices import Device
from ..spec import Knobs, OpSpec, Statics
from . import _ssd

_KNOBS = (
    _ssd.block("BLOCK_SIZE_H", 1, 64, "heads that one program computes"),
    _ssd.block("BLOCK_SIZE_T", 16, 256, "tokens of a chunk that one step takes"),
    _ssd.NUM_WARPS,
)


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """16 heads, so that the rows read are a memory sector or more each, and what 4 warps hold of their tokens."""
    del statics, dtype, device, size  # part of every heuristic's signature
    return {"BLOCK_SIZE_H": 16, "BLOCK_SIZE_T": 128, "num_warps": 4}


SSD_CHUNK_CUMSUM = OpSpec(
    name="ssd_chunk_cumsum",
    static_keys=("nheads", "chunk_size"),
    dtype_key="dtype",
    dtypes=_ssd.DTYPES,
    dtype_aliases=_ssd.DTYPE_ALIASES,
    # Of all sequences; nheads: those on this device, after tensor parallelism.
    size_key="tokens",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=_ssd.pallas_knobs(_KNOBS),
    pallas_rule=_ssd.pallas_rule,
    heuristic=heuristic,
    tuned_at=("B", "T"),
    vllm_compatible=False,
)
