"""Tuning tables of `ssd.bmm_chunk`."""

from ..devices import Device
from ..spec import Knobs, OpSpec, Statics
from . import _ssd

_KNOBS = (
    _ssd.block("BLOCK_SIZE_M", 16, 128, "tokens of C that one program computes"),
    _ssd.block("BLOCK_SIZE_N", 16, 256, "tokens of B that one program computes"),
    _ssd.block("BLOCK_SIZE_K", 16, 256, "elements of dstate of one step"),
    _ssd.NUM_WARPS,
)


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """A chunk of 128 tokens at once, and dstate too in most models; less for fp32, for which see `ssd_chunk_state`, as for
    why the size has no say."""
    del statics, device, size  # part of every heuristic's signature
    if dtype == "float32":
        return {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "num_warps": 4}
    return {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "num_warps": 8}


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
