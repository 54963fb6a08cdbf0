"""What the tuning tables of the SSD stages have in common."""

from collections.abc import Mapping

from ..spec import Knob, Knobs, Statics, Value

# Only the width of an element matters to a launch.
DTYPES: tuple[str, ...] = ("float16", "float32")
DTYPE_ALIASES = {"bfloat16": "float16"}

NUM_WARPS = Knob("num_warps", (1, 2, 4, 8), "warps of one program")
NUM_STAGES = Knob("num_stages", (1, 2, 3, 4), "steps of the kernel's loop whose loads are under way at once")


def block(name: str, low: int, high: int, doc: str) -> Knob:
    """A power of two; what is longer than the tensor is cut."""
    return Knob(name, tuple(1 << i for i in range(low.bit_length() - 1, high.bit_length())), doc)


def pallas_rule(shared: Mapping[str, Value], statics: Statics) -> Knobs:
    """The same blocks and stages; Mosaic GPU runs whole warpgroups, whatever num_warps says."""
    del statics  # part of every rule's signature
    return {name: value for name, value in shared.items() if name != "num_warps"}


def pallas_knobs(knobs: tuple[Knob, ...]) -> tuple[Knob, ...]:
    return tuple(knob for knob in knobs if knob is not NUM_WARPS)
