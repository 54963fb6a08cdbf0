"""Tuning tables of `gdn.recompute_w_u`."""

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics
from . import _ssd

_KNOBS = (
    _ssd.block("BLOCK_SIZE_K", 16, 256, "columns of w that one product gives"),
    _ssd.block("BLOCK_SIZE_V", 16, 256, "columns of u that one product gives"),
    # Not 4: compilers have got kernels of this kind wrong with 4 warps and 64 tokens.
    Knob("num_warps", (1, 2, 8), "warps of one program"),
)


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """Blocks of 128; of fp32, whose products hold their operands in registers, 16."""
    del device, size
    if dtype == "float32":
        return {"BLOCK_SIZE_K": 16, "BLOCK_SIZE_V": 16, "num_warps": 8}
    return {"BLOCK_SIZE_K": 128, "BLOCK_SIZE_V": 128, "num_warps": 8 if statics["chunk_size"] == 64 else 2}


GDN_RECOMPUTE_W_U = OpSpec(
    name="gdn_recompute_w_u",
    static_keys=("K", "V", "chunk_size"),
    dtype_key="dtype",
    dtypes=_ssd.DTYPES,
    dtype_aliases=_ssd.DTYPE_ALIASES,
    size_key="tokens x value heads",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=_KNOBS[:2],
    pallas_rule=_ssd.pallas_rule,
    heuristic=heuristic,
    tuned_at=("T", "H_v"),
    vllm_compatible=False,
)
