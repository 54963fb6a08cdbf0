"""Tuning tables of `gdn.chunk_local_cumsum`."""

from ..devices import Device
from ..spec import Knobs, OpSpec, Statics
from . import _ssd

_KNOBS = (
    _ssd.block("BLOCK_SIZE_H", 1, 128, "value heads of one chunk that one program sums up"),
    _ssd.NUM_WARPS,
)


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """Eight heads: whole 32-byte sectors of an fp32 gate."""
    del statics, dtype, device, size  # part of every heuristic's signature
    return {"BLOCK_SIZE_H": 8, "num_warps": 2}


GDN_CHUNK_LOCAL_CUMSUM = OpSpec(
    name="gdn_chunk_local_cumsum",
    static_keys=("chunk_size",),
    dtype_key="dtype",
    dtypes=_ssd.DTYPES,
    dtype_aliases=_ssd.DTYPE_ALIASES,
    size_key="tokens x value heads",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=_ssd.pallas_knobs(_KNOBS),
    pallas_rule=_ssd.pallas_rule,
    heuristic=heuristic,
    tuned_at=("T", "H_v"),
    vllm_compatible=False,
)
