"""Tuning tables of `gdn.chunk_delta_h`."""

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics
from . import _ssd

# States from which on a second block of columns is not needed to give every SM of the largest GPUs its program.
_PLENTY = 64

_KNOBS = (
    _ssd.block("BLOCK_SIZE_V", 16, 256, "columns of one head's state that one program carries"),
    _ssd.NUM_WARPS,
    Knob("num_stages", (1, 2, 3, 4), "chunks on their way into shared memory"),
)


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """The widest block that leaves every SM a program, within the registers of its threads."""
    del device
    if dtype == "float32":
        return {"BLOCK_SIZE_V": 16, "num_warps": 8, "num_stages": 1}
    if statics["K"] > 128:
        return {"BLOCK_SIZE_V": 32, "num_warps": 8, "num_stages": 2}
    if size >= _PLENTY:
        return {"BLOCK_SIZE_V": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_SIZE_V": 32, "num_warps": 4, "num_stages": 2}


GDN_CHUNK_DELTA_H = OpSpec(
    name="gdn_chunk_delta_h",
    static_keys=("K", "V", "chunk_size"),
    dtype_key="dtype",
    dtypes=_ssd.DTYPES,
    dtype_aliases=_ssd.DTYPE_ALIASES,
    # What there is to do at once; value heads: those on this device, after tensor parallelism.
    size_key="sequences x value heads",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=_ssd.pallas_knobs(_KNOBS),
    pallas_rule=_ssd.pallas_rule,
    heuristic=heuristic,
    tuned_at=("T", "H_v"),
    vllm_compatible=False,
)
