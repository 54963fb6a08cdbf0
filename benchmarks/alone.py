"""One measurement at a time on a machine, so that several processes may compile for it at once.

    python -m benchmarks tune causal_conv1d --dtype bfloat16 &
    python -m benchmarks tune selective_state_update --dtype float32 &

Compiling takes most of a tuner's time and no GPU. What runs kernels holds this lock, which ends with the process.
"""

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def lock_file() -> Path:
    return Path(tempfile.gettempdir()) / "ssm_benchmarks.lock"


@contextmanager
def alone() -> Iterator[None]:
    """Not to be nested: a process would wait for itself."""
    with lock_file().open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
