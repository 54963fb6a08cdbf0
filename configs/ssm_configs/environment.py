"""Environment variables, read often."""

import os
from collections.abc import Callable, Hashable


def reader(*names: str) -> Callable[[], Hashable]:
    """A function that returns something equal whenever the variables are as they were.

    `os.environ.get` takes half a microsecond for a variable that is not set: it encodes the name and catches an exception.
    What it looks into has no public name, so it stays the way where that is not there.
    """
    data = getattr(os.environ, "_data", None)
    if not isinstance(data, dict):
        return lambda: tuple([os.environ.get(name) for name in names])
    keys = [os.environ.encodekey(name) for name in names]  # type: ignore[attr-defined]
    return lambda: tuple([data.get(key) for key in keys])
