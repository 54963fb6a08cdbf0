"""One clock for both frameworks in one process.

`KinetoClock` reads kernel durations from torch's profiler. Its source, CUPTI, records every kernel of the process, also
those that JAX's runtime launches, so both twins and all peers are timed by the same counter, without launch gaps and
without host time. `EventsClock` is the fallback for machines where the profiler cannot run; it knows torch only.

Cold times: before every call a buffer of twice the L2 cache is written, as `triton.testing.do_bench` does, and candidates
take turns, so that a drift of the clocks meets all of them alike.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from parity_tests import graphs

from .alone import alone
from .events import AttributionError, CallActivity, DeviceEvent, attribute

_WARM_UP = 2
# The profiler may lose a record now and then; twice in the same place is no accident.
_ATTEMPTS = 2


@dataclass(frozen=True)
class Call:
    """One thing to time. `issue` launches it and returns, `wait` returns when it is done on the device."""

    label: str
    framework: str
    issue: Callable[[], Any]
    wait: Callable[[], None]


@dataclass(frozen=True)
class Sample:
    """Microseconds of device time for one call: median and the 20th and 80th percentile of the repeats."""

    us: float
    us_p20: float
    us_p80: float
    kernels: tuple[str, ...]
    """What ran, in order: a copy of the state that nobody asked for shows here."""


class Clock(Protocol):
    def supports(self, framework: str) -> bool: ...

    def cold_us(self, calls: Sequence[Call], repeats: int) -> list[Sample]: ...


class ClockError(RuntimeError):
    """The clock does not see what it is asked to time."""


class _Flush:
    """Writes twice the L2 cache."""

    def __init__(self, device: torch.device):
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        # 16-bit fills are rare enough that no timed operator launches the same kernel.
        self._buffer = torch.empty(max(size, 64 << 20) // 2, dtype=torch.int16, device=device)

    def __call__(self) -> None:
        self._buffer.fill_(1)


class KinetoClock:
    """Device time from torch's profiler, one session for a whole batch of calls (a session costs tens of ms)."""

    def __init__(self, device: torch.device):
        if torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():
            raise ClockError("torch's profiler cannot see this GPU; --clock events times the torch side without it")
        self._flush = _Flush(device)

    def supports(self, framework: str) -> bool:
        return True

    @alone()
    def cold_us(self, calls: Sequence[Call], repeats: int) -> list[Sample]:
        for call in calls:
            for _ in range(_WARM_UP):
                call.issue()
            call.wait()
        failure: AttributionError | None = None
        for _ in range(_ATTEMPTS):
            try:
                activity = attribute(self._session(calls, repeats), repeats * len(calls))
            except AttributionError as error:
                failure = error
            else:
                return [_sample(activity[i :: len(calls)]) for i in range(len(calls))]
        labels = ", ".join(dict.fromkeys(f"{call.label} [{call.framework}]" for call in calls))
        raise ClockError(
            f"torch's profiler did not see every call of {labels}: {failure}. Is another profiler attached to this "
            "process? --clock events times the torch side without it."
        ) from failure

    def _session(self, calls: Sequence[Call], repeats: int) -> list[DeviceEvent]:
        """Flush, call, flush, call, ...; what the device did."""
        session = torch.autograd.profiler.profile(use_cpu=False, use_device="cuda", use_kineto=True)
        with session:
            for _ in range(repeats):
                for call in calls:
                    self._flush()
                    torch.cuda.synchronize()
                    call.issue()
                    call.wait()
                    torch.cuda.synchronize()
        return _device_events(session)


class EventsClock:
    """CUDA events around the call. Includes launch latency of short kernels, and cannot see JAX's stream."""

    def __init__(self, device: torch.device):
        self._flush = _Flush(device)

    def supports(self, framework: str) -> bool:
        return framework == "torch"

    @alone()
    def cold_us(self, calls: Sequence[Call], repeats: int) -> list[Sample]:
        if unseen := [call.label for call in calls if not self.supports(call.framework)]:
            raise ClockError(f"--clock events cannot time JAX: {', '.join(unseen)}")
        for call in calls:
            for _ in range(_WARM_UP):
                call.issue()
        pairs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
        for _ in range(repeats):
            for call, own in zip(calls, pairs, strict=True):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self._flush()
                start.record()
                call.issue()
                end.record()
                own.append((start, end))
        torch.cuda.synchronize()
        return [_sample([CallActivity(round(a.elapsed_time(b) * 1e6), ()) for a, b in own]) for own in pairs]


CLOCKS = {"kineto": KinetoClock, "events": EventsClock}


def host_us(call: Call, calls: int = 100) -> float:
    """Host time of one call that nobody waits for, in microseconds.

    Calls are issued in short runs with a wait after each: a full launch queue (JAX allows 32 programs in flight) would
    bill the device's time to the host.
    """
    run = 10
    times = []
    call.wait()
    for _ in range(max(1, calls // run)):
        start = time.perf_counter_ns()
        for _ in range(run):
            call.issue()
        times.append((time.perf_counter_ns() - start) / run / 1e3)
        call.wait()
    return statistics.median(times)


def replay_us(call: Call, device: torch.device, repeats: int = 50) -> float | None:
    """Microseconds of one replay of a CUDA graph of the call with a cold L2 cache; None where there is none of it."""
    if call.framework != "torch" or device.type != "cuda":
        return None
    try:
        with graphs.capture() as graph:
            call.issue()
    except RuntimeError:  # it waits for the device
        synchronize()
        return None
    return EventsClock(device).cold_us([Call(call.label, "torch", graph.replay, synchronize)], repeats)[0].us


def synchronize() -> None:
    """Wait for everything that torch launched; operands on the CPU have nothing to wait for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_call(size: int, device: torch.device) -> Call:
    """A device-to-device copy of `size` bytes: it moves 2·size, which no kernel that reads and writes can beat."""
    # Random bytes: constant data can move faster than anything real does.
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Call(f"copy {size}", "torch", lambda: target.copy_(source), synchronize)


def _device_events(session: torch.autograd.profiler.profile) -> list[DeviceEvent]:
    results = session.kineto_results
    if results is None:
        return []
    if hasattr(results, "events"):
        return [
            DeviceEvent(event.name(), event.start_ns(), event.duration_ns())
            for event in results.events()
            if event.device_type().name == "CUDA" and not event.is_user_annotation()
        ]
    # The raw list is not public API; this one is, and takes ten times as long.
    return [
        DeviceEvent(event.name, round(event.time_range.start * 1e3), round(event.time_range.elapsed_us() * 1e3))
        for event in session.function_events or []
        if event.device_type.name == "CUDA"
    ]


def _sample(activity: Sequence[CallActivity]) -> Sample:
    ordered = sorted(call.nanoseconds / 1e3 for call in activity)
    last = len(ordered) - 1
    p20, p80 = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return Sample(statistics.median(ordered), p20, p80, activity[-1].names)
