"""Makes programs ready: from the store, else in processes of their own, else here."""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from ssm_configs.models import warming
from ssm_configs.models.warming import Job

from ._stored_programs import Store, name_of, without_jax_cache
from ._warmup_farm import Task, compile_apart
from ._warmup_jitted import Place
from ._warmup_programs import Program

TITLE = "pallas_ssm.warmup"
# Programs that a process should have to compile: it takes as long as two or three of them until it can begin.
_WORTH_A_PROCESS = 6
# Of the memory that JAX may take. A context is some 500 MiB.
_SHARE, _CONTEXT = 16, 500 << 20
_log = logging.getLogger(TITLE)


@dataclass(frozen=True)
class How:
    """A warm-up's circumstances and its caller's wishes."""

    device: Any
    circumstances: str | None
    """Their digest, if programs may be stored."""
    where: Place
    folder: str | os.PathLike | None
    processes: int | None
    threads: int
    progress: bool


@dataclass(frozen=True)
class Ready:
    """What was done beside what this process compiled."""

    held: int = 0
    """Programs that the store had."""
    apart: int = 0
    """Programs that other processes compiled."""
    jobs: Sequence[Job] = ()
    """What is left to do, in this process."""


def make_ready(programs: Sequence[Program], how: How) -> Ready:
    """Loads and keeps what the folder holds or other processes can compile."""
    if not programs or how.circumstances is None:
        return Ready()
    tasks = []
    for name, function, shapes in programs:
        stored_as = name_of(function, shapes, how.circumstances)
        if not function.keeps(shapes, how.where, stored_as):
            tasks.append(Task(name, function, shapes, stored_as))
    loaded: set[str] = set()
    with _open(how.folder) as (store, path, stays):

        def load(task: Task) -> None:
            program = store.load(task.stored_as, how.device)
            if program is not None:
                task.function.keep(task.shapes, how.where, task.stored_as, program)
                loaded.add(task.stored_as)

        stored = [Job(task.name, partial(load, task)) for task in tasks if store.holds(task.stored_as)]
        warming.run_jobs(stored, how.threads, how.progress, TITLE)
        held = len(loaded)
        missing = [task for task in tasks if task.stored_as not in loaded]
        processes = _processes(how, len(missing))
        if processes > 1:
            with warming.bar(len(missing), how.progress, TITLE) as advance:

                def done(task: Task) -> None:
                    load(task)
                    advance()

                compile_apart(missing, path, how.device, processes, done)
        left = [task for task in missing if task.stored_as not in loaded]
        if stays and left:
            with without_jax_cache():
                jobs = [_here(task, how.where, store) for task in left]
                warming.run_jobs(jobs, how.threads, how.progress, TITLE)
            left = []
    return Ready(held, len(loaded) - held, [_here(task, how.where, None) for task in left])


def _here(task: Task, where: Place, store: Store | None) -> Job:
    def compile_and_keep(lowered: jax.stages.Lowered) -> None:
        program = lowered.compile()
        task.function.keep(task.shapes, where, task.stored_as, program)
        if store is None:
            return
        try:
            store.save(task.stored_as, program)
        except Exception as error:
            # It runs all the same.
            _log.warning("%s: not stored: %s: %s", task.name, type(error).__name__, error)

    return Job(task.name, compile_and_keep, lambda: task.function.lower_anew(task.shapes))


def _processes(how: How, programs: int) -> int:
    """How many to compile in; 1 is this one."""
    if programs == 0 or jax.process_count() > 1:  # another process would not find the device by its number
        return 1
    if how.processes is not None:
        return how.processes
    # A CPU's programs are small. And each process takes a context on every GPU there is.
    if how.device.platform != "gpu" or jax.local_device_count() > 1:
        return 1
    memory = (how.device.memory_stats() or {}).get("bytes_limit", 0)
    return max(1, min(memory // _SHARE // _CONTEXT, _cores() - 1, programs // _WORTH_A_PROCESS))


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _open(folder: Any) -> Iterator[tuple[Store, str, bool]]:
    """A store there, or one that lasts until its programs are loaded; its folder; and whether it is there to stay."""
    if folder is not None and "://" not in os.fspath(folder):  # which only JAX can write to
        try:
            store = Store(folder)
        except OSError as error:
            _log.warning("cache_dir: nothing is stored: %s", error)
        else:
            yield store, os.fspath(folder), True
            return
    with tempfile.TemporaryDirectory(prefix="pallas_ssm_") as temporary:
        yield Store(temporary), temporary, False
