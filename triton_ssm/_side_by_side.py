"""Kernels of one call that are compiled at the same time, where each would wait for the one before it.

Half of a compile is LLVM's and ptxas' work, which leaves Python to others.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from triton.runtime import driver


class _Launcher(Protocol):
    is_new: bool
    """Never launched, and so not compiled."""
    compile_ahead: Callable[..., None]
    __call__: Callable[..., None]


class _Held(threading.local):
    launches: list[tuple[_Launcher, tuple]] | None = None


held = _Held()


@contextlib.contextmanager
def side_by_side() -> Iterator[None]:
    """Launches inside are made at its end, those of new kernels after these were compiled in threads.

    For launches that find all their tensors allocated: until the end, nothing may read what they write.
    """
    launches = held.launches = []
    try:
        yield
    finally:
        held.launches = None
    new: dict[_Launcher, tuple] = {}
    for launcher, arguments in launches:
        if launcher.is_new:
            new.setdefault(launcher, arguments)
    ahead = list(new)[1:]  # the first one is compiled by its launch
    if ahead and not _driver_is_ready():
        ahead = []
    threads = {launcher: _started(launcher.compile_ahead, new[launcher]) for launcher in ahead}
    try:
        for launcher, arguments in launches:
            if thread := threads.pop(launcher, None):
                thread.join()
            launcher(*arguments)
    finally:
        for thread in threads.values():
            if thread is not None:
                thread.join()


def _driver_is_ready() -> bool:
    """Threads might initialise it twice. Where there is none, the first launch will say so."""
    try:
        return driver.active is not None
    except RuntimeError:
        return False


def _started(function: Callable[..., None], arguments: tuple) -> threading.Thread | None:
    thread = threading.Thread(target=function, args=arguments, name=__name__)
    try:
        thread.start()
    except RuntimeError:  # no thread to be had: the launch will compile it
        return None
    return thread
