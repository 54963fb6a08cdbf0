"""Which device activity belongs to which timed call: pure arithmetic on a profiler's event list."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class DeviceEvent(NamedTuple):
    """A kernel, copy or memset on the device, times in nanoseconds."""

    name: str
    start: int
    duration: int


class AttributionError(RuntimeError):
    """The recorded activity cannot be told apart by calls, so no time may be reported."""


@dataclass(frozen=True)
class CallActivity:
    """Everything the device did for one call."""

    nanoseconds: int
    names: tuple[str, ...]


def attribute(events: Sequence[DeviceEvent], n_calls: int) -> list[CallActivity]:
    """Splits one profiler session into its calls, in time order.

    Every call is preceded by one flush and waited for, so the session is flush, call, flush, call, ... and begins with a
    flush: whatever that first event is called, the flushes are. Two flushes with nothing between are a call of which the
    profiler saw nothing, which is an error and not a time of zero.
    """
    if not events:
        raise AttributionError("the profiler recorded no device activity at all")
    ordered = sorted(events, key=lambda event: event.start)
    flush = ordered[0].name
    calls: list[list[DeviceEvent]] = []
    for event in ordered:
        if event.name == flush:
            calls.append([])
        else:
            calls[-1].append(event)
    if len(calls) != n_calls:
        raise AttributionError(f"expected {n_calls} flushes ({flush}), the profiler recorded {len(calls)}")
    for number, call in enumerate(calls):
        if not call:
            raise AttributionError(f"the profiler recorded nothing for call {number} of {n_calls}")
    return [CallActivity(sum(event.duration for event in call), tuple(event.name for event in call)) for call in calls]
