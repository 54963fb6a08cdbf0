"""No compile after warm-up: what a server runs its requests under."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from triton import knobs

from ssm_configs.late_compile import LateCompileError

_lock = threading.Lock()
_depth = 0
_before: Any = None


@contextlib.contextmanager
def forbid_compiles() -> Iterator[None]:
    """A Triton kernel that would be compiled inside raises `LateCompileError` instead, with its name and what is new about it.

    Also where the compiled kernel lies in Triton's cache on disk, for loading it is time that a request waits for. Holds for
    all kernels and all threads of the process, ours or not; nothing of ours autotunes. Nesting is fine.
    """
    global _depth, _before
    with _lock:
        _depth += 1
        if _depth == 1:
            _before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, _refuse
    try:
        yield
    finally:
        # The last to leave gives the hook back: threads need not leave in the order in which they came.
        with _lock:
            _depth -= 1
            if _depth == 0:
                _before, knobs.runtime.jit_cache_hook = None, _before


def _refuse(*, fn: Any, compile: Mapping[str, Any], **others: Any) -> bool:
    del others
    function = fn.jit_function
    asked = _variant(function, compile)
    known = [_variant(function, {"signature": kernel.src.signature, "constants": kernel.src.constants,
                                 "num_warps": kernel.metadata.num_warps, "num_stages": kernel.metadata.num_stages})
             for kernels, *_ in list(function.device_caches.values()) for kernel in list(kernels.values())]  # fmt: skip
    raise LateCompileError(f"{fn.name}: compiled under forbid_compiles(): {_difference(asked, known)}")


def _variant(function: Any, compile: Mapping[str, Any]) -> dict[str, str]:
    """What a compiled kernel is known by: type or constant of every parameter, and the options."""
    constants = {position[0] if isinstance(position, tuple) else position: value
                 for position, value in compile["constants"].items()}  # fmt: skip
    variant = {}
    for position, (name, kind) in enumerate(compile["signature"].items()):
        constant = constants.get(position, constants.get(name))
        variant[name] = repr(getattr(constant, "value", constant)) if kind == "constexpr" else str(kind)
    return variant | {"num_warps": str(compile["num_warps"]), "num_stages": str(compile["num_stages"])}


def _difference(asked: Mapping[str, str], known: list[dict[str, str]]) -> str:
    if not known:
        return "nothing of this kernel was compiled before"
    nearest = min(known, key=lambda other: sum(asked.get(name) != value for name, value in other.items()))
    changes = [
        f"{name} is {asked.get(name)}, was {value}" for name, value in nearest.items() if asked.get(name) != value
    ]
    if not changes:
        # Triton also specialises on whether a pointer or an integer is divisible by 16, and on integers of 1.
        return "the alignment of an argument, or its being 1, is new"
    return f"of {len(known)} compiled variants, the nearest differs in: {'; '.join(changes)}"
