"""Programs compiled in processes of their own: tracing and lowering hold Python's lock, so threads would take turns."""

import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

import jax

import ssm_configs

from ._stored_programs import settings_here
from ._warmup_child import Start
from ._warmup_jitted import Jitted

_PLATFORM_SETTINGS = ("jax_platforms", "jax_cuda_visible_devices")
# What takes longest to compile goes first, so that no process begins with it when the others are done.
_LONGEST_FIRST = ("mamba_chunk_scan_combined", "chunk_gated_delta_rule")

_log = logging.getLogger("pallas_ssm.warmup")


class Task(NamedTuple):
    """A program to make ready."""

    name: str
    function: Jitted
    shapes: dict[str, jax.ShapeDtypeStruct]
    stored_as: str


def compile_apart(
    tasks: Sequence[Task], folder: str, device: Any, processes: int, done: Callable[[Task], object]
) -> list[Task]:
    """Has them compiled and stored in `folder`, calling `done` (in any thread) for each; returns those that were not.

    A process gets the next one when it has stored the last, and all end with this call.
    """
    values = jax.config.values
    settings = settings_here() | {name: values[name] for name in _PLATFORM_SETTINGS}
    start = Start(folder, settings, device.platform, jax.devices(device.platform).index(device))
    farm = _Farm(sorted(tasks, key=_longest_first), done)
    children: list[subprocess.Popen[bytes]] = []
    threads: list[threading.Thread] = []
    with tempfile.TemporaryFile() as errors:
        try:
            for _ in range(min(processes, len(tasks))):
                child = _start(errors)
                children.append(child)
                threads.append(threading.Thread(target=farm.serve, args=(child, start), daemon=True))
                threads[-1].start()
            for thread in threads:
                thread.join()
        except OSError as error:
            farm.problems.append(f"a process could not be started: {error}")
        finally:
            # What they stored is whole. Killed, they end sooner than if they took JAX down.
            for child in children:
                child.kill()
            for thread in threads:
                thread.join()
            for child in children:
                child.wait()
                for pipe in (child.stdin, child.stdout):
                    if pipe is not None:
                        _close(pipe)
        errors.seek(0)
        said = errors.read()[-2000:].decode(errors="replace").strip()
    for message in dict.fromkeys(farm.warnings):
        warnings.warn(message, ssm_configs.TableWarning, stacklevel=2)
    left = [task for task in tasks if task.stored_as not in farm.stored]
    if left:
        why = farm.problems[0] if farm.problems else "every process had ended"
        _log.warning("%d of %d programs are compiled in this process: %s\n%s", len(left), len(tasks), why, said)
    return left


class _Farm:
    """The tasks that wait, and what became of the others."""

    def __init__(self, tasks: Sequence[Task], done: Callable[[Task], object]) -> None:
        self._waiting, self._done = deque(tasks), done
        self.stored: set[str] = set()
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def serve(self, child: subprocess.Popen[bytes], start: Start) -> None:
        """One child, until nothing waits or it ends."""
        assert child.stdin is not None and child.stdout is not None
        try:
            pickle.dump(start, child.stdin)
            while self._waiting:
                try:
                    task = self._waiting.popleft()
                except IndexError:
                    return
                answer = self._ask(child.stdin, child.stdout, task)
                self.warnings += answer["warnings"]
                if answer["error"] is None:
                    self.stored.add(task.stored_as)
                    self._done(task)
                else:
                    self.problems.append(f"{task.name}: {answer['error']}")
        except Exception as error:
            self.problems.append(f"a process ended with code {child.poll()}: {type(error).__name__}: {error}")

    def _ask(self, requests: IO[bytes], answers: IO[bytes], task: Task) -> dict[str, Any]:
        shapes = {name: (tuple(shape.shape), str(shape.dtype)) for name, shape in task.shapes.items()}
        pickle.dump((task.stored_as, task.function.op, dict(task.function.options), shapes), requests)
        requests.flush()
        line = answers.readline()
        if not line:
            raise EOFError(f"no answer to {task.name}")
        return json.loads(line)


def _start(errors: IO[bytes]) -> subprocess.Popen[bytes]:
    # Modules come from where this process has them, and not from the folder it happens to be in.
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    # A share of the memory for each would leave none.
    environment = os.environ | {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-P", "-m", "pallas_ssm._warmup_child"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment)


def _close(pipe: IO[bytes]) -> None:
    try:
        pipe.close()
    except OSError:  # what was not sent yet
        pass


def _longest_first(task: Task) -> tuple[bool, int]:
    size = sum(shape.size for shape in task.shapes.values())
    return task.function.op not in _LONGEST_FIRST, -size
