"""Tuning tables of `fused_recurrent_gated_delta_rule`."""

from collections.abc import Mapping

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics, Value

_WARPS_PER_WARPGROUP = 4
_MAX_V = 256
# Elements of the state: 2 for each thread that an H200's 132 SMs hold.
_FEW = 132 * 2048 * 2

_KNOBS = (
    Knob("BLOCK_SIZE_V", tuple(1 << i for i in range(9)), "columns of one head's state that one program updates"),
    Knob("num_warps", (1, 2, 4, 8), "warps of one program"),
)


def pallas_rule(shared: Mapping[str, Value], statics: Statics) -> Knobs:
    """The Pallas launch that matches a Triton one: keep the columns that a warp holds, up to all of them.

    Mosaic GPU runs whole warpgroups of 4 warps, so BLOCK_SIZE_V is the shared one times 4 / num_warps.
    """
    columns = shared["BLOCK_SIZE_V"] * _WARPS_PER_WARPGROUP // shared["num_warps"]
    whole = 1 << (statics["V"] - 1).bit_length()
    return {"BLOCK_SIZE_V": max(1, min(columns, whole, _MAX_V))}


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """64 elements of the state a thread, in columns wide enough for lines of 64 bytes or, of fp32, of 256.

    Where that leaves SMs without a thread to hold, columns of one 32-byte sector: of 16 bits by four times the warps, of fp32
    by half the elements a thread.
    """
    del device
    rows = 1 << (statics["K"] - 1).bit_length()
    whole = 1 << (statics["V"] - 1).bit_length()
    wide = dtype == "float32"
    if size * rows * whole <= _FEW:
        columns, elements = (8, 32) if wide else (16, 16)
    else:
        columns, elements = (64, 64) if wide else (32, 64)
    columns = min(columns, whole)
    return {"BLOCK_SIZE_V": columns, "num_warps": min(8, max(1, columns * rows // (32 * elements)))}


FUSED_RECURRENT_GATED_DELTA_RULE = OpSpec(
    name="fused_recurrent_gated_delta_rule",
    static_keys=("K", "V"),
    dtype_key="state_dtype",
    dtypes=("float16", "float32"),
    # Only the width of a state element matters to the launch.
    dtype_aliases={"bfloat16": "float16"},
    # value heads: those on this device, after tensor parallelism.
    size_key="sequences x value heads",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=(Knob("BLOCK_SIZE_V", tuple(1 << i for i in range(9)), "columns that one thread block updates"),),
    pallas_rule=pallas_rule,
    heuristic=heuristic,
    tuned_at=("B", "H_v"),
    vllm_compatible=False,
)
