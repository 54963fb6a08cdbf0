"""Kernels of one call compile at the same time, and are launched in the call's order."""

import threading
import types
from typing import Any

import pytest

from triton_ssm import _side_by_side
from triton_ssm._side_by_side import held, side_by_side


class Kernel:
    """A launcher whose launch waits for `until`, and that notes what happens to it."""

    def __init__(self, name: str, log: list[tuple[str, str, bool]], is_new: bool = True) -> None:
        self.name, self.log, self.is_new = name, log, is_new
        self.until: threading.Event | None = None
        self.compiling = threading.Event()
        self.error: Exception | None = None

    def compile_ahead(self, *arguments: Any) -> None:
        self.compiling.set()
        self._note("compile")

    def launch(self, *arguments: Any) -> None:
        """As `Launcher` does it."""
        assert held.launches is not None
        held.launches.append((self, arguments))  # pyright: ignore[reportArgumentType]

    def __call__(self, *arguments: Any) -> None:
        assert held.launches is None and arguments == (self.name,)
        if self.until is not None:
            assert self.until.wait(20), "nothing was compiled meanwhile"
        self._note("launch")
        self.is_new = False
        if self.error is not None:
            raise self.error

    def _note(self, what: str) -> None:
        self.log.append((what, self.name, threading.current_thread() is threading.main_thread()))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bool]]:
    monkeypatch.setattr(_side_by_side, "driver", types.SimpleNamespace(active=object()))  # there may be no GPU
    return []


def test_the_later_ones_are_compiled_under_the_first(log):
    first, known, second, third = Kernel("a", log), Kernel("b", log, is_new=False), Kernel("c", log), Kernel("d", log)
    kernels = (known, first, second, third, second)
    first.until = second.compiling
    with side_by_side():
        for kernel in kernels:
            kernel.launch(kernel.name)
        assert not log
    assert [(name, main) for what, name, main in log if what == "launch"] == [(name, True) for name in "bacdc"]
    compiles = {(name, main) for what, name, main in log if what == "compile"}
    assert compiles == {("c", False), ("d", False)} and len(log) == 5 + 2
    assert log.index(("compile", "d", False)) < log.index(("launch", "d", True))
    log.clear()
    with side_by_side():
        for kernel in kernels:
            kernel.launch(kernel.name)
    assert [what for what, *_ in log] == ["launch"] * 5


def test_what_goes_wrong(log):
    first, second = Kernel("a", log), Kernel("b", log)
    with pytest.raises(ZeroDivisionError), side_by_side():
        first.launch("a")
        raise ZeroDivisionError
    assert not log and held.launches is None
    first.error = KeyError()
    before = threading.active_count()
    with pytest.raises(KeyError), side_by_side():
        first.launch("a")
        second.launch("b")
    assert sorted(log) == [("compile", "b", False), ("launch", "a", True)]
    assert threading.active_count() == before


def test_without_threads_each_is_compiled_by_its_launch(log, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with side_by_side():
        for name in "ab":
            Kernel(name, log).launch(name)
    assert log == [("launch", "a", True), ("launch", "b", True)]
