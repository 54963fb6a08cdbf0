"""Tuning tables of `selective_state_update`: name, content and look-up are vLLM's, so that tables move both ways."""

from collections.abc import Mapping

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics, Value

_WARPS_PER_WARPGROUP = 4
_MAX_ROWS = 1024
# Elements of the state that a block of 4 warps holds in registers.
_MAX_HELD = 40 * 32 * _WARPS_PER_WARPGROUP
# Elements of the state: of one program, and so few of them all that they are 4 for each thread that an H200's 132 SMs hold.
_TILE = 1024
_FEW = 132 * 2048 * 4

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
    itself up to 1024. One tile per block. Up to 40 elements a thread it is held in registers: on an H200 as fast as by TMA
    where sequences are many, and up to a quarter faster where they are few or dstate is 16. Larger ones, which would leave
    room for few blocks, go by TMA.
    """
    headdim = statics["headdim"]
    divisors = [rows for rows in range(1, min(headdim, _MAX_ROWS) + 1) if headdim % rows == 0]
    whole_warps = [rows for rows in divisors if rows % _WARPS_PER_WARPGROUP == 0]
    target = shared["BLOCK_SIZE_M"] * _WARPS_PER_WARPGROUP / shared["num_warps"]
    rows = min(whole_warps, key=lambda rows: (abs(rows - target), -rows)) if whole_warps else divisors[-1]
    return {"BLOCK_SIZE_M": rows, "tiles_per_block": 1, "use_tma": rows * statics["dstate"] > _MAX_HELD}


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """1024 elements of the state a program, by one warp: 32 a thread, so that few threads load the dt, B and C of them all.

    Rows of up to 64 elements by four warps, 8 elements a thread, where the state is fp32, whose bytes suffice to keep the
    memory busy, or small, where most of a GPU would idle. (vLLM's rule goes by dstate alone: 4 warps by 4 to 32 rows. It
    takes 2.4 times as long for many 16-bit states on an H200.)
    """
    del device
    columns = 1 << (statics["dstate"] - 1).bit_length()
    rows = max(1, min(_TILE // columns, 1 << (statics["headdim"] - 1).bit_length()))
    few = size * statics["headdim"] * columns <= _FEW
    spread = columns <= 64 and (few or dtype == "float32")
    warps = max(1, rows * columns // (32 * (8 if spread else 32)))
    return {"BLOCK_SIZE_M": rows, "num_warps": min(warps, 32)}


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
