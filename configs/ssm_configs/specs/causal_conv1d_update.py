"""Tuning tables of `causal_conv1d_update`."""

from collections.abc import Mapping

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics, Value

_WARPS_PER_WARPGROUP = 4
_PALLAS_D = (64, 128, 256, 512, 1024, 2048)
# A few thread blocks for each SM of the largest GPUs.
_PLENTY = 512

_SEQUENCES = Knob(
    "BLOCK_SIZE_B", (1, 2, 4, 8), "sequences of one token that one program updates; packed ones have their own"
)

_KNOBS = (
    Knob("BLOCK_SIZE_D", tuple(1 << i for i in range(4, 13)), "channels of a sequence that one program updates"),
    _SEQUENCES,
    Knob("num_warps", (1, 2, 4, 8), "warps of one program"),
)


def pallas_rule(shared: Mapping[str, Value], statics: Statics) -> Knobs:
    """The Pallas launch that matches a Triton one: keep the sequences, and the channels that a warp holds.

    Mosaic GPU runs whole warpgroups of 4 warps, so BLOCK_SIZE_D is the shared one times 4 / num_warps, brought into 64 to
    2048.
    """
    del statics  # part of every rule's signature; the width does not matter to the blocks
    channels = shared["BLOCK_SIZE_D"] * _WARPS_PER_WARPGROUP // shared["num_warps"]
    channels = min(max(channels, _PALLAS_D[0]), _PALLAS_D[-1])
    return {"BLOCK_SIZE_D": channels, "BLOCK_SIZE_B": shared["BLOCK_SIZE_B"]}


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """The widest block of 128 to 512 channels that still leaves plenty of programs, then of two sequences.

    8 bytes of a row a thread: 4 channels of 16 bits, 2 of fp32.
    """
    del statics, device  # part of every heuristic's signature
    channels, sequences = 128, 1
    while channels < 512 and size >= _PLENTY * 2 * channels:
        channels *= 2
    if size >= _PLENTY * 2 * channels:
        sequences = 2
    by_warp = 64 if dtype == "float32" else 128
    return {"BLOCK_SIZE_D": channels, "BLOCK_SIZE_B": sequences, "num_warps": channels // by_warp}


CAUSAL_CONV1D_UPDATE = OpSpec(
    name="causal_conv1d_update",
    static_keys=("width",),
    dtype_key="dtype",
    dtypes=("float16", "float32"),
    # Only the width of an element matters to the launch.
    dtype_aliases={"bfloat16": "float16"},
    # channels: those on this device, after tensor parallelism.
    size_key="sequences x channels",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=(
        Knob("BLOCK_SIZE_D", _PALLAS_D, "channels of a sequence that one thread block updates"),
        _SEQUENCES,
    ),
    pallas_rule=pallas_rule,
    heuristic=heuristic,
    tuned_at=("B", "D"),
    vllm_compatible=False,
)
