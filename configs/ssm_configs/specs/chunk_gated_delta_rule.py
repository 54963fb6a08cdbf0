"""Tuning tables of `chunk_gated_delta_rule`: which path, and how the kernels run that are its own."""

from collections.abc import Mapping

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics, Value
from . import _ssd

# States from which on the programs that carry them fill the largest GPUs, two blocks of columns each.
_PLENTY = 64

_KNOBS = (
    Knob(
        "FUSED", bool, "outputs computed by the program that carries the state (False: all chunks at once, afterwards)"
    ),
    _ssd.block("BLOCK_SIZE_V", 16, 256, "fused: columns of one head's state that one program carries"),
    # On an H200 Triton 3.6 gets this kernel wrong with 4 warps and 32 columns: other values, and addresses behind its memory.
    Knob("num_warps", (8,), "fused: warps of one program"),
    Knob("num_stages", (1, 2, 3, 4), "fused: chunks on their way into shared memory"),
    Knob("kkt_num_warps", (1, 2, 4, 8), "warps of the program that inverts a chunk's triangle"),
)
_TRITON_ONLY = ("num_warps", "kkt_num_warps")


def pallas_rule(shared: Mapping[str, Value], statics: Statics) -> Knobs:
    """The same path, blocks and stages; Mosaic GPU runs whole warpgroups, whatever the warps."""
    del statics  # part of every rule's signature
    return {name: value for name, value in shared.items() if name not in _TRITON_ONLY}


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """Fused where there are states enough, and shared memory for their chunks."""
    del device
    solve = 8 if dtype == "float32" else 4
    if dtype == "float32":
        return {"FUSED": False, "BLOCK_SIZE_V": 16, "num_warps": 8, "num_stages": 1, "kkt_num_warps": solve}
    if statics["K"] > 128:
        return {"FUSED": False, "BLOCK_SIZE_V": 16, "num_warps": 8, "num_stages": 2, "kkt_num_warps": solve}
    if size < _PLENTY:
        return {"FUSED": False, "BLOCK_SIZE_V": 32, "num_warps": 8, "num_stages": 2, "kkt_num_warps": solve}
    return {"FUSED": True, "BLOCK_SIZE_V": 64, "num_warps": 8, "num_stages": 2, "kkt_num_warps": solve}


CHUNK_GATED_DELTA_RULE = OpSpec(
    name="chunk_gated_delta_rule",
    static_keys=("K", "V", "chunk_size"),
    dtype_key="dtype",
    dtypes=_ssd.DTYPES,
    dtype_aliases=_ssd.DTYPE_ALIASES,
    # What there is to do at once; value heads: those on this device, after tensor parallelism.
    size_key="sequences x value heads",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=tuple(knob for knob in _KNOBS if knob.name not in _TRITON_ONLY),
    pallas_rule=pallas_rule,
    heuristic=heuristic,
    tuned_at=("T", "H_v"),
    vllm_compatible=False,
)
