"""Tuning tables of `gdn.chunk_o`.

Triton's form for Hopper (16 bits, chunks of 64, K and V of 64 or 128) goes by HEADS and num_stages alone: it runs 4 warps,
reads 64 columns of a head at a time, and no more of them ahead than lets two programs share an SM. The other knobs are for
the plain form, which serves all other calls.
"""

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics
from . import _ssd

_KNOBS = (
    _ssd.block("BLOCK_SIZE_K", 16, 256, "elements of K that one product sums over"),
    _ssd.block("BLOCK_SIZE_V", 16, 256, "columns of the output that one program computes"),
    Knob("HEADS", (1, 2, 4, 8), "value heads of one key head that one program computes, at most"),
    _ssd.NUM_WARPS,
    Knob("num_stages", (1, 2, 3), "heads on their way into shared memory, at most"),
)

# Chunks of single heads in two programs on each of an H200's 132 SMs, and twice that.
_SIZE_OF_PAIRS = 2 * 2 * 132 * 64


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """One head a program, all of its operands asked for at once: the operator waits for memory and for nothing else.

    The form for Hopper asks for all at once anyway, and reads q and k once for two heads where that leaves enough programs.
    """
    if dtype == "float32":
        return {"BLOCK_SIZE_K": 32, "BLOCK_SIZE_V": 16, "HEADS": 1, "num_warps": 8, "num_stages": 1}
    wide = statics["chunk_size"] == 64 and statics["V"] > 64
    width = 128 if wide and statics["K"] <= 128 else 64
    hopper = device.capability == (9, 0) and statics["chunk_size"] == 64 and {statics["K"], statics["V"]} <= {64, 128}
    heads = 2 if hopper and size >= _SIZE_OF_PAIRS else 1
    return {
        "BLOCK_SIZE_K": 256, "BLOCK_SIZE_V": width, "HEADS": heads, "num_warps": 8 if wide else 4, "num_stages": heads,
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
