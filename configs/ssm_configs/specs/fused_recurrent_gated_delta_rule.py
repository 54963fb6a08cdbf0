"""Tuning tables of `fused_recurrent_gated_delta_rule`."""

from collections.abc import Mapping

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics, Value

_WARPS_PER_WARPGROUP = 4
_MAX_V = 256

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
    """64 elements of the state a thread: columns of whole 64-byte lines, one warp where they fit it."""
    del device, size
    columns = 16 if dtype == "float32" else 32
    whole = 1 << (statics["V"] - 1).bit_length()
    columns = min(columns, whole)
    rows = 1 << (statics["K"] - 1).bit_length()
    return {"BLOCK_SIZE_V": columns, "num_warps": min(8, max(1, columns * rows // (32 * 64)))}


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
