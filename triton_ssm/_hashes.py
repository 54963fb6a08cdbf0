"""One hash for a kernel in every process, so that Triton's cache on disk serves the next one.

Triton 3.6 hashes a kernel with all that it calls and with the constants that those read; but a called function's constants
are there only if it has been hashed before, for whichever kernel came first. With kernels in another order, or in threads, the
same kernel would have another hash, and be compiled once more.
"""

import threading
from types import ModuleType
from typing import Any

from triton.runtime.jit import JITCallable

_lock = threading.Lock()
_settled: set[int] = set()


def settle(kernel: Any) -> None:
    """Hashes all that `kernel` calls, the innermost first, and then itself. (The interpreter's kernels have no hash.)"""
    if isinstance(kernel, JITCallable):
        with _lock:
            _settle(kernel)


def _settle(function: JITCallable) -> None:
    if id(function) in _settled:  # what is jitted lives as long as its module
        return
    _settled.add(id(function))
    for called in _mentioned(function):
        _settle(called)
    function.cache_key  # noqa: B018


def _mentioned(function: JITCallable) -> list[JITCallable]:
    """What it may call, by the names in its code: as they are, or as members of modules."""
    names = function.fn.__code__.co_names
    values = [function.__globals__.get(name) for name in names]
    modules = [value for value in values if isinstance(value, ModuleType)]
    for module in modules:  # which grows on the way
        members = [getattr(module, name, None) for name in names]
        modules += [member for member in members if isinstance(member, ModuleType) and member not in modules]
        values += members
    return [value for value in values if isinstance(value, JITCallable)]
