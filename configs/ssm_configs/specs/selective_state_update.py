"""Tuning tables of `selective_state_update`: name, content and look-up are vLLM's, so that tables move both ways."""

from collections.abc import Mapping

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics, Value

_WARPS_PER_WARPGROUP = 4
_MAX_ROWS = 1024

_BLOCK_SIZE_M = Knob(
    "BLOCK_SIZE_M",
    tuple(1 << i for i in range(11)),
    "rows of headdim that one program holds, each with the whole dstate",
)
_NUM_WARPS = Knob("num_warps", (1, 2, 4, 8, 16, 32), "warps of one program")


def pallas_rule(shared: Mapping[str, Value], statics: Statics) -> Knobs:
    """The Pallas launch that matches a Triton one: keep the rows that a warp holds.

    Mosaic GPU runs whole warpgroups of 4 warps, so the target is BLOCK_SIZE_M * 4 / num_warps rows. A block has no
    masked tail and its warps take equal rows, so the result is the divisor of headdim nearest to the target among the
    multiples of 4 (ties to the larger), or, where headdim has none, its largest divisor that a block may hold: headdim
    itself up to 1024. One tile per block; loads by TMA.
    """
    headdim = statics["headdim"]
    divisors = [rows for rows in range(1, min(headdim, _MAX_ROWS) + 1) if headdim % rows == 0]
    whole_warps = [rows for rows in divisors if rows % _WARPS_PER_WARPGROUP == 0]
    target = shared["BLOCK_SIZE_M"] * _WARPS_PER_WARPGROUP / shared["num_warps"]
    rows = min(whole_warps, key=lambda rows: (abs(rows - target), -rows)) if whole_warps else divisors[-1]
    return {"BLOCK_SIZE_M": rows, "tiles_per_block": 1, "use_tma": True}


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """vLLM's rule for a device without a table: dstate alone decides, and whether the device is Blackwell (SM 10.x).

    A device of unknown capability counts as not Blackwell.
    """
    del dtype, size  # part of every heuristic's signature; vLLM's rule for this op does not look at them
    dstate = statics["dstate"]
    if dstate <= 16:
        rows, warps = 32, 4
    elif dstate <= 32:
        rows, warps = 16, 4
    elif dstate <= 64:
        rows, warps = 8, 4
    elif device.capability is not None and device.capability[0] == 10:
        rows, warps = 32, 8
    elif dstate <= 128:
        rows, warps = 4, 4
    else:
        rows, warps = 4, 8
    return {"BLOCK_SIZE_M": rows, "num_warps": warps}


SELECTIVE_STATE_UPDATE = OpSpec(
    name="selective_state_update",
    static_keys=("headdim", "dstate"),
    dtype_key="cache_dtype",
    dtypes=("float16", "float32"),
    # Only the width of a state element matters to the launch.
    dtype_aliases={"bfloat16": "float16"},
    # nheads: the heads on this device, after tensor parallelism.
    size_key="batch x nheads (batch = number of sequences)",
    knobs=(_BLOCK_SIZE_M, _NUM_WARPS),
    triton_knobs=(_BLOCK_SIZE_M, _NUM_WARPS),
    pallas_knobs=(
        Knob("BLOCK_SIZE_M", range(1, _MAX_ROWS + 1), "rows of headdim in one tile", divides="headdim"),
        Knob("tiles_per_block", (1, 2, 4, 8), "tiles that one thread block walks through"),
        Knob("use_tma", bool, "load the state through the tensor memory accelerator"),
    ),
    pallas_rule=pallas_rule,
    heuristic=heuristic,
    tuned_at=("B", "H"),
    vllm_compatible=True,
)
