"""Tuning tables of `ssd.bmm_chunk`."""

from ..devices import Device
from ..spec import Knobs, OpSpec, Statics
from . import _ssd

_KNOBS = (
    _ssd.block("BLOCK_SIZE_M", 16, 128, "tokens of C that one program computes"),
    _ssd.block("BLOCK_SIZE_N", 16, 256, "tokens of B that one program computes"),
    _ssd.block("BLOCK_SIZE_K", 16, 256, "elements of dstate of one step"),
    _ssd.NUM_WARPS,
    _ssd.NUM_STAGES,
)


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """64 by 64 tokens; half of that for fp32, whose products are outside tensor cores. The size has no say, as in
    `ssd_chunk_state`."""
    del statics, device, size  # part of every heuristic's signature
    if dtype == "float32":
        return {"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 16, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "num_warps": 4, "num_stages": 2}


SSD_BMM_CHUNK = OpSpec(
    name="ssd_bmm_chunk",
    static_keys=("dstate", "chunk_size"),
    dtype_key="dtype",
    dtypes=_ssd.DTYPES,
    dtype_aliases=_ssd.DTYPE_ALIASES,
    size_key="tokens x ngroups",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=_ssd.pallas_knobs(_KNOBS),
    pallas_rule=_ssd.pallas_rule,
    heuristic=heuristic,
    tuned_at=("B", "T", "G"),
    vllm_compatible=False,
)
