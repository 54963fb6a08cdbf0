"""No compile after warm-up: what a server runs its requests under."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax import monitoring

from ssm_configs.late_compile import LateCompileError

# JAX reports each with the name of the function; a trace precedes whatever else a miss costs.
_EVENTS = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration")
_EXPLAINER = logging.getLogger("jax._src.interpreters.partial_eval")

_lock = threading.Lock()
_depth = 0
_explanations = threading.local()


@contextlib.contextmanager
def forbid_compiles() -> Iterator[None]:
    """A JAX program that would be traced or compiled inside raises `LateCompileError` instead, with its name and what is new.

    Holds for all of JAX and all threads of the process, ours or not: also for single operations outside of `jax.jit`, such
    as the making of an array of a new shape. Nesting is fine.
    """
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            monitoring.register_event_duration_secs_listener(_refuse)
            _EXPLAINER.addFilter(_keep)
    try:
        with jax.explain_cache_misses(True):
            yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                monitoring.unregister_event_duration_listener(_refuse)
                _EXPLAINER.removeFilter(_keep)


def _keep(record: logging.LogRecord) -> bool:
    """JAX's explanation goes into the error and not to the log."""
    message = record.getMessage()
    if "CACHE MISS" not in message:
        return True
    _explanations.last = message
    return False


def _refuse(event: str, duration_secs: float, **details: Any) -> None:
    del duration_secs
    if event not in _EVENTS:
        return
    name = details.get("fun_name", "a function")
    why = _explanations.__dict__.pop("last", "an operation outside of jax.jit, or one that nothing is known about")
    raise LateCompileError(f"{name}: compiled under forbid_compiles(): {why}")
