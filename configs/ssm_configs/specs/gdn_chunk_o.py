"""Tuning tables of `gdn.chunk_o`."""

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics
from . import _ssd

_KNOBS = (
    _ssd.block("BLOCK_SIZE_K", 16, 256, "elements of K that one product sums over"),
    _ssd.block("BLOCK_SIZE_V", 16, 256, "columns of the output that one program computes"),
    Knob("HEADS", (1, 2, 4, 8), "value heads of one key head that one program computes, at most"),
    _ssd.NUM_WARPS,
    Knob("num_stages", (1, 2, 3), "heads on their way into shared memory"),
)


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """One head a program, all of its operands asked for at once: the operator waits for memory and for nothing else."""
    del device, size
    if dtype == "float32":
        return {"BLOCK_SIZE_K": 32, "BLOCK_SIZE_V": 16, "HEADS": 1, "num_warps": 8, "num_stages": 1}
    wide = statics["chunk_size"] == 64 and statics["V"] > 64
    width = 128 if wide and statics["K"] <= 128 else 64
    return {
        "BLOCK_SIZE_K": 256, "BLOCK_SIZE_V": width, "HEADS": 1, "num_warps": 8 if wide else 4, "num_stages": 1,
    }  # fmt: skip


GDN_CHUNK_O = OpSpec(
    name="gdn_chunk_o",
    static_keys=("K", "V", "chunk_size"),
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
