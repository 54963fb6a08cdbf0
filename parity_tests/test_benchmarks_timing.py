"""The clock's arithmetic, on event lists as the profiler gives them."""

import fcntl

import pytest

from benchmarks import alone, timing
from benchmarks.events import AttributionError, DeviceEvent, attribute

FLUSH = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<short>>"


def session(*calls: list[tuple[str, int]]) -> list[DeviceEvent]:
    """Flush, call, flush, call, ... with a pause between all events."""
    events, now = [], 1_000_000
    for call in calls:
        for name, duration in [(FLUSH, 60_000), *call]:
            events.append(DeviceEvent(name, now, duration))
            now += duration + 5_000
    return events


def test_durations_of_a_call_add_up_and_names_keep_their_order():
    events = session([("kernel", 2_000)], [("Memcpy DtoD (Device -> Device)", 9_000), ("kernel", 2_100)])
    first, second = attribute(events, 2)
    assert (first.nanoseconds, first.names) == (2_000, ("kernel",))
    assert (second.nanoseconds, second.names) == (11_100, ("Memcpy DtoD (Device -> Device)", "kernel"))


def test_the_order_of_the_records_does_not_matter():
    events = session([("a", 1)], [("b", 2)], [("a", 3)])
    assert [call.nanoseconds for call in attribute(events[::-1], 3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("events", "n_calls", "message"),
    [
        ([], 1, "no device activity at all"),
        (session([("a", 1)], []), 2, "nothing for call 1 of 2"),
        (session([], [("a", 1)]), 2, "nothing for call 0 of 2"),
        (session([("a", 1)]), 2, "expected 2 flushes .* recorded 1"),
        (session([("a", 1)], [("a", 1)])[1:], 2, "nothing for call 1 of 2"),
        (session([("a", 1)], [("b", 1)])[1:], 2, "expected 2 flushes .* recorded 1"),
    ],
)
def test_what_was_not_seen_is_an_error_and_never_a_zero(events, n_calls, message):
    with pytest.raises(AttributionError, match=message):
        attribute(events, n_calls)


class Recorded(timing.KinetoClock):
    """A clock whose sessions were recorded elsewhere."""

    def __init__(self, *sessions: list[DeviceEvent]):
        self.sessions = list(sessions)

    def _session(self, calls, repeats):
        return self.sessions.pop(0)


def call(label: str, framework: str = "torch") -> timing.Call:
    return timing.Call(label, framework, lambda: None, lambda: None)


def test_interleaved_candidates_get_their_own_medians():
    rounds = [[("a", 1_000 * i)] if name == "a" else [("b", 10_000 * i)] for i in (3, 1, 2, 5, 4) for name in "ab"]
    a, b = Recorded(session(*rounds)).cold_us([call("a"), call("b")], repeats=5)
    assert (a.us, a.us_p20, a.us_p80, a.kernels) == (3, 2, 4, ("a",))
    assert (b.us, b.us_p20, b.us_p80, b.kernels) == (30, 20, 40, ("b",))


def test_a_lost_record_costs_one_more_session():
    good = session([("a", 1_000)])
    assert Recorded(good[:1], good).cold_us([call("a")], repeats=1)[0].us == 1


def test_a_clock_that_does_not_see_jax_says_so():
    blind = session([("triton", 1_000)], [])
    with pytest.raises(timing.ClockError, match=r"mosaic_gpu \[jax\].*nothing for call 1.*--clock events"):
        Recorded(blind, blind).cold_us([call("triton"), call("mosaic_gpu", "jax")], repeats=1)


def test_the_events_clock_refuses_jax():
    clock = object.__new__(timing.EventsClock)
    assert clock.supports("torch") and not clock.supports("jax")
    with pytest.raises(timing.ClockError, match="cannot time JAX: mosaic_gpu"):
        clock.cold_us([call("mosaic_gpu", "jax")], repeats=1)


def test_host_time_excludes_the_wait():
    import time

    issued = []
    slow = timing.Call("slow", "torch", lambda: issued.append(None), lambda: time.sleep(0.01))
    assert timing.host_us(slow, calls=30) < 1_000
    assert len(issued) == 30


def test_one_measures_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(alone, "lock_file", lambda: tmp_path / "lock")

    def is_free() -> bool:
        with (tmp_path / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    with alone.alone():
        assert not is_free()
    assert is_free()
    held = []

    class Clock(timing.EventsClock):
        def __init__(self):
            self._flush = lambda: held.append(not is_free())

        def supports(self, framework: str) -> bool:
            held.append(not is_free())
            return False

    with pytest.raises(timing.ClockError):
        Clock().cold_us([timing.Call("x", "jax", lambda: None, lambda: None)], 1)
    assert held and all(held)
