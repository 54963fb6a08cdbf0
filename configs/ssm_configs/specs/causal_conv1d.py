"""Tuning tables of `causal_conv1d`; `causal_conv1d_split` launches the same kernel with the same config."""

from collections.abc import Mapping

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics, Value

_WARPS_PER_WARPGROUP = 4
_PALLAS_T = (4, 8, 16, 32, 64, 128)
_PALLAS_D = (64, 128, 256, 512, 1024, 2048)
# Tokens of a block, and programs that are plenty: 8 for each SM of a large GPU; 32, all that an SM holds at once, for the
# longest, which serve better only where one wave of programs follows another.
_PLENTY = ((32, 4096), (16, 1024))

_KNOBS = (
    Knob("BLOCK_SIZE_T", tuple(1 << i for i in range(9)), "tokens of one sequence that one program computes"),
    Knob("BLOCK_SIZE_D", tuple(1 << i for i in range(4, 13)), "channels that one program computes"),
    Knob("num_warps", (1, 2, 4, 8), "warps of one program"),
)


def pallas_rule(shared: Mapping[str, Value], statics: Statics) -> Knobs:
    """The Pallas launch that matches a Triton one: keep the tokens of a block and the channels that a warp holds.

    Mosaic GPU runs whole warpgroups of 4 warps, so BLOCK_SIZE_D is the shared one times 4 / num_warps, then both blocks
    are brought into their legal range: 4 to 128 tokens, 64 to 2048 channels.
    """
    del statics  # part of every rule's signature; the width does not matter to the blocks
    channels = shared["BLOCK_SIZE_D"] * _WARPS_PER_WARPGROUP // shared["num_warps"]
    return {
        "BLOCK_SIZE_T": min(max(shared["BLOCK_SIZE_T"], _PALLAS_T[0]), _PALLAS_T[-1]),
        "BLOCK_SIZE_D": min(max(channels, _PALLAS_D[0]), _PALLAS_D[-1]),
    }


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """256 channels, and the longest block of 8 to 32 tokens that still leaves plenty of programs.

    A block reads the width - 1 inputs before it once more, which longer blocks do less often. The short ones, where threads
    are few, have four warps; the others two, 8 bytes of 16-bit channels a thread.
    """
    del statics, device  # part of every heuristic's signature
    channels = 256
    tokens = next((tokens for tokens, plenty in _PLENTY if size >= plenty * channels * tokens), 8)
    return {
        "BLOCK_SIZE_T": tokens,
        "BLOCK_SIZE_D": channels,
        "num_warps": 4 if tokens == 8 or dtype == "float32" else 2,
    }


CAUSAL_CONV1D = OpSpec(
    name="causal_conv1d",
    static_keys=("width",),
    dtype_key="dtype",
    dtypes=("float16", "float32"),
    # Only the width of an element matters to the launch.
    dtype_aliases={"bfloat16": "float16"},
    # tokens: of all sequences. channels: those on this device, after tensor parallelism.
    size_key="tokens x channels",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=(
        Knob("BLOCK_SIZE_T", _PALLAS_T, "tokens of one sequence that one thread block computes"),
        Knob("BLOCK_SIZE_D", _PALLAS_D, "channels that one thread block computes"),
    ),
    pallas_rule=pallas_rule,
    heuristic=heuristic,
    tuned_at=("T", "D"),
    vllm_compatible=False,
)
