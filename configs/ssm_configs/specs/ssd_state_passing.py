"""Tuning tables of `ssd.state_passing`."""

from ..devices import Device
from ..spec import Knobs, OpSpec, Statics
from . import _ssd

_KNOBS = (
    _ssd.block("BLOCK_SIZE", 64, 4096, "elements of one head's state that one program carries"),
    _ssd.NUM_WARPS,
    _ssd.NUM_STAGES,
)


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """512 elements by 4 warps, one 16-byte access a thread: few enough that 16 heads of one prompt still fill a GPU."""
    del statics, dtype, device, size  # part of every heuristic's signature
    return {"BLOCK_SIZE": 512, "num_warps": 4, "num_stages": 4}


SSD_STATE_PASSING = OpSpec(
    name="ssd_state_passing",
    static_keys=("headdim", "dstate"),
    # The chunks' states are always fp32.
    dtype_key="dtype",
    dtypes=("float32",),
    dtype_aliases={},
    # nheads: those on this device, after tensor parallelism.
    size_key="sequences x nheads",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=_ssd.pallas_knobs(_KNOBS),
    pallas_rule=_ssd.pallas_rule,
    heuristic=heuristic,
    tuned_at=("B", "T", "H", "L"),
    vllm_compatible=False,
)
