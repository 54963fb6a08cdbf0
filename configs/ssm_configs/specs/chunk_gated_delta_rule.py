"""Tuning tables of `chunk_gated_delta_rule`: which path, and how the kernels run that are its own."""

from collections.abc import Mapping

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics, Value
from . import _ssd

# What the fused kernels take in both packages.
_CAPABILITY = (9, 0)
_CHUNK = 64
_FUSED = (64, 128)

_KNOBS = (
    Knob("FUSED", bool, "two kernels, where they take the call (False: stage by stage)"),
    Knob("HEADS", (1, 2), "fused: value heads of a key head that one program prepares; 1 where 2 do not divide them"),
    Knob("num_stages", (2, 3, 4), "fused: chunks in shared memory of a program that carries a state, if they fit"),
    Knob("kkt_num_warps", (1, 2, 4, 8), "stage by stage: warps of the program that inverts a chunk's triangle"),
)
_TRITON_ONLY = ("kkt_num_warps",)


def pallas_rule(shared: Mapping[str, Value], statics: Statics) -> Knobs:
    """The same path, heads and stages; stage by stage it is XLA's."""
    del statics  # part of every rule's signature
    return {name: value for name, value in shared.items() if name not in _TRITON_ONLY}


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """Fused wherever the kernels take the sizes, with as many chunks in shared memory as fit."""
    del size
    wide = dtype == "float32"
    fits = statics["chunk_size"] == _CHUNK and statics["K"] in _FUSED and statics["V"] in _FUSED
    return {
        "FUSED": device.capability == _CAPABILITY and not wide and fits,
        "HEADS": 2,
        "num_stages": 4 if statics["K"] <= 64 else 3,
        "kkt_num_warps": 8 if wide else 4,
    }


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
