"""Tuning tables of `gdn.chunk_scaled_dot_kkt`."""

from ..devices import Device
from ..spec import Knobs, OpSpec, Statics
from . import _ssd

_KNOBS = (
    _ssd.block("BLOCK_SIZE_K", 16, 256, "elements of K that one product sums over"),
    _ssd.NUM_WARPS,
)


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """Keys of up to 128 at once; of fp32, whose products hold their operands in registers, 16."""
    del device, size
    if dtype == "float32":
        return {"BLOCK_SIZE_K": 16, "num_warps": 8}
    return {"BLOCK_SIZE_K": 128, "num_warps": 4 if statics["chunk_size"] == 64 else 2}


GDN_CHUNK_SCALED_DOT_KKT = OpSpec(
    name="gdn_chunk_scaled_dot_kkt",
    static_keys=("K", "chunk_size"),
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
