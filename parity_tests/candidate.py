"""Somebody's own implementation, put in a twin's place."""

import importlib
import sys
from collections.abc import Callable


def load(spec: str) -> Callable:
    """The function that "module:function" names; ValueError with what is wrong."""
    module_name, colon, function_name = spec.partition(":")
    if not colon or not module_name or not function_name:
        raise ValueError(f"--candidate: expected module:function, got {spec!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"--candidate: cannot import {module_name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--candidate: expected a function {function_name!r} in {module_name!r}, got {function!r}")
    return function


def framework(function: Callable) -> str:
    """ "torch" or "jax", by what the function's module works with; ValueError where that does not tell."""
    names = vars(sys.modules[function.__module__]).values()
    roots = {getattr(value, "__module__", None) or getattr(value, "__name__", "") for value in names}
    roots = {str(root).partition(".")[0] for root in roots}
    found = {name for name, package in (("torch", "torch"), ("torch", "triton"), ("jax", "jax")) if package in roots}
    if len(found) != 1:
        raise ValueError(
            f"--framework: expected torch or jax to be named, for {function.__module__} uses both or neither"
        )
    return found.pop()
