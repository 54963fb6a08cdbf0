"""Tuning tables of `ssd.chunk_state`."""

from ..devices import Device
from ..spec import Knobs, OpSpec, Statics
from . import _ssd

_KNOBS = (
    _ssd.block("BLOCK_SIZE_M", 16, 128, "rows of headdim that one program computes"),
    _ssd.block("BLOCK_SIZE_N", 16, 256, "columns of dstate that one program computes"),
    _ssd.block("BLOCK_SIZE_K", 16, 128, "tokens of one step"),
    _ssd.NUM_WARPS,
    _ssd.NUM_STAGES,
)


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """64 by 128, the whole state of most models, so that x and B are read once, and the whole of a 128-token chunk at once:
    faster on an H200 (225 µs for 8192 tokens of 128 heads) than any loop over parts of it, pipelined or not. For fp32, whose
    products take three operands' registers, what spills nowhere.

    The size has no say: what a sequence comes to must not depend on what it is packed with or where it was split.
    """
    del statics, device, size  # part of every heuristic's signature
    if dtype == "float32":
        return {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "num_warps": 4, "num_stages": 1}


SSD_CHUNK_STATE = OpSpec(
    name="ssd_chunk_state",
    static_keys=("headdim", "dstate", "chunk_size"),
    dtype_key="dtype",
    dtypes=_ssd.DTYPES,
    dtype_aliases=_ssd.DTYPE_ALIASES,
    # nheads: those on this device, after tensor parallelism.
    size_key="tokens x nheads",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=_ssd.pallas_knobs(_KNOBS),
    pallas_rule=_ssd.pallas_rule,
    heuristic=heuristic,
    tuned_at=("B", "T", "H", "G"),
    vllm_compatible=False,
)
