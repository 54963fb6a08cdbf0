"""Tuning tables of `ssd.chunk_scan`."""

from ..devices import Device
from ..spec import Knobs, OpSpec, Statics
from . import _ssd

_KNOBS = (
    _ssd.block("BLOCK_SIZE_M", 16, 128, "tokens that one program computes"),
    _ssd.block("BLOCK_SIZE_N", 16, 128, "columns of headdim that one program computes"),
    _ssd.block("BLOCK_SIZE_K", 16, 128, "earlier tokens of one step"),
    _ssd.block("BLOCK_SIZE_DSTATE", 16, 256, "elements of dstate that are multiplied at once"),
    _ssd.NUM_WARPS,
    _ssd.NUM_STAGES,
)


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """64 tokens by 64 of headdim in small steps, the fastest of two dozen on an H200; less for fp32, for which see
    `ssd_chunk_state`, as for why the size has no say."""
    del statics, device, size  # part of every heuristic's signature
    if dtype == "float32":
        return {
            "BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 16, "BLOCK_SIZE_DSTATE": 32,
            "num_warps": 4, "num_stages": 1,
        }  # fmt: skip
    return {
        "BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "BLOCK_SIZE_DSTATE": 32,
        "num_warps": 4, "num_stages": 1,
    }  # fmt: skip


SSD_CHUNK_SCAN = OpSpec(
    name="ssd_chunk_scan",
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
