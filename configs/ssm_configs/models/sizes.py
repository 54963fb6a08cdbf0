"""Every launch config that an operator's calls can get while their size goes from nothing to the most that is served."""

from ..config import Config
from ..devices import Device
from ..lookup import lookup
from ..specs import get_spec
from ..table import read_table

# Sizes up to this one are all looked up, larger ones in steps of it: rules go by chunks of 64 tokens, or by doubling.
_STEP = 64
_MOST_STEPS = 4096


def reached_configs(
    op: str, *, twin: str, device: Device, dtype: str, unit: int, most: int, **static: int
) -> dict[Config, range]:
    """The distinct configs of sizes unit, 2·unit, … most·unit, each with the counts between which it was found.

    Exact for tables, whose keys are all asked for, and for rules that change by whole chunks of 64 or by doubling.
    """
    request = {"twin": twin, "device": device, "dtype": dtype, **static}
    asked = set(range(1, min(most, _STEP) + 1))
    step = _STEP * max(1, -(-most // (_STEP * _MOST_STEPS)))
    asked |= set(range(_STEP, most + 1, step)) | {most}
    path = lookup(op, size=most * unit, **request).path
    if path is not None:
        for entry in read_table(path, get_spec(op), static).entries:
            near = {entry.size // unit, -(-entry.size // unit)}
            asked |= {min(max(count, 1), most) for count in near}
    found: dict[Config, range] = {}
    for count in sorted(asked):
        config = lookup(op, size=count * unit, **request)
        found[config] = range(found[config].start if config in found else count, count + 1)
    return found
