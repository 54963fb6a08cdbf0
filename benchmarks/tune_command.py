"""`python -m benchmarks tune <op>`: jobs, logs and tables around the tuner.

`tune stages [op …]` goes through the stages of the chunked operators, with each one's own grid. A table is written as soon as
it is done, and, of one that is being measured when the tuner is stopped, the rows that are known by then; its metadata say
what is missing ("unfinished"), and the next run goes on from the log.
"""

import argparse
import datetime
import itertools
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ssm_configs import Device
from ssm_configs.search import SHIPPED
from ssm_configs.spec import TWINS, Knobs

from . import environment, stages, tables, winners
from .implementations import OWN
from .lab import Lab
from .machine import Machine, this_machine
from .op import BenchOp, Storage
from .ops import OPS
from .timing import CLOCKS
from .tune import Job, TuningError, estimate_seconds, is_complete, timed_configs, tried, tune
from .tuning_log import TuningLog

TUNED = {"triton": "triton", "pallas": "mosaic_gpu"}
"""The implementation that a twin's table entries launch."""
# What a limit leaves for timing the candidates that have been compiled by then.
_COMPILING = 0.7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ops = parser.add_subparsers(dest="op", required=True, metavar="op")
    for op in OPS.values():
        command = ops.add_parser(op.name, help=f"tune {op.name}", description=__doc__)
        for key in op.spec.static_keys:
            text = f"a table each (default: {' '.join(map(str, op.grid[key]))})"
            command.add_argument(f"--{key}", type=int, nargs="+", default=op.grid[key], metavar="N", help=text)
        command.add_argument(
            f"--{op.spec.dtype_key.replace('_', '-')}", dest="dtypes", nargs="+", default=_dtypes(op),
            choices=op.spec.dtypes, help=f"a table each (default: {' '.join(_dtypes(op))})",
        )  # fmt: skip
        text = f"rows of a table: {op.spec.size_key} (default: {' '.join(map(str, op.sizes))})"
        command.add_argument("--sizes", type=int, nargs="+", default=op.sizes, metavar="N", help=text)
        _add_common(command)
    _add_common(stages.add_parser(ops, "tune", __doc__))


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--twin", nargs="+", default=TWINS, choices=TWINS, help="whose rows (default: both)")
    command.add_argument("--clock", choices=CLOCKS, default="kineto", help="events: no profiler, but Triton only")
    command.add_argument("--tables", type=Path, default=SHIPPED, help="where the tables go (default: %(default)s)")
    command.add_argument(
        "--log",
        type=Path,
        default=Path("tuning-log"),
        help="measurements so far, from which it goes on (default: %(default)s)",
    )
    text = 'about so long for each table and twin; the table says which sizes are left, under "unfinished"'
    command.add_argument("--limit-s", type=float, metavar="S", help=text)


def validate(arguments: argparse.Namespace) -> None:
    """ValueError for what argparse cannot see."""
    if arguments.clock == "events" and "pallas" in arguments.twin:
        raise ValueError("--clock events cannot time JAX: add --twin triton")
    if arguments.limit_s is not None and arguments.limit_s <= 0:
        raise ValueError(f"--limit-s: expected a positive number of seconds, got {arguments.limit_s:g}")
    if arguments.op == stages.NAME:
        return stages.validate(arguments)
    jobs_of(OPS[arguments.op], arguments)


def main(arguments: argparse.Namespace) -> int:
    machine = this_machine(arguments.clock)
    if arguments.op == stages.NAME:
        return stages.each(arguments.ops, lambda name: run(OPS[name], _defaults(OPS[name], arguments), machine))
    return run(OPS[arguments.op], arguments, machine)


def _defaults(op: BenchOp, arguments: argparse.Namespace) -> argparse.Namespace:
    """What `tune` of this one operator would have without further words."""
    own = {"op": op.name, "sizes": op.sizes, "dtypes": _dtypes(op), **op.grid}
    return argparse.Namespace(**{**vars(arguments), **own})


def _dtypes(op: BenchOp) -> tuple[str, ...]:
    return op.tuned_dtypes or op.spec.dtypes


def run(op: BenchOp, arguments: argparse.Namespace, machine: Machine) -> int:
    for twin in arguments.twin:
        if twin in op.untuned:
            print(f"{op.name}: nothing to tune for {twin}: {op.untuned[twin]}", flush=True)
    jobs, storage = jobs_of(op, arguments), Storage(machine.device)
    if not jobs:
        return 0
    twins = dict.fromkeys(job.twin for job in jobs)
    labs = {twin: Lab(op, OWN[TUNED[twin]](machine.device), machine.clock, storage) for twin in twins}
    seconds = sum(estimate_seconds(job, labs[job.twin].compiled_case) for job in jobs)
    print(
        f"{op.name}: {len(jobs)} jobs on {machine.target.name}, about {seconds / 60:.1f} minutes; log in {arguments.log}",
        flush=True,
    )

    failed = done = 0
    totals = [sum(timed_configs(job, labs[job.twin].compiled_case).values()) for job in jobs]
    # Without a terminal the line at the end of each job has to do.
    with tqdm(total=sum(totals), unit="config", smoothing=0.1, disable=None) as bar:
        for job, total in zip(jobs, totals, strict=True):
            bar.set_description(str(job))
            start = time.perf_counter()
            is_late = _deadline(start, arguments.limit_s)
            try:
                log = open_log(arguments.log, job, machine.target)
                tune(job, labs[job.twin], log, bar.update, is_late, partial(_rule, job, machine.target))
            except TuningError as error:
                failed += 1
                bar.write(f"error: {error}")
            except BaseException:  # SIGTERM's SystemExit among them
                path = write(job, machine.target, arguments.log, arguments.tables, stopped=True)
                bar.write(f"stopped after {time.perf_counter() - start:.1f} s  {job}: {path or 'no row is known yet'}")
                raise
            labs[job.twin].forget()
            done += total
            bar.update(done - bar.n)  # some finalists were the same
            path = write(job, machine.target, arguments.log, arguments.tables)
            bar.write(f"{time.perf_counter() - start:6.1f} s  {job}: {path or 'no table, nothing complete'}")
    return 1 if failed else 0


def _rule(job: Job, device: Device, size: int) -> Knobs:
    """The config of the written rule."""
    shared = job.op.spec.heuristic(job.statics, job.dtype, device, size)
    return dict(job.op.spec.launch_knobs(job.twin, shared, None, job.statics))


def jobs_of(op: BenchOp, arguments: argparse.Namespace) -> list[Job]:
    """Largest states first: their buffers then serve all others, and what does not fit fails at once."""
    grid = [getattr(arguments, key) for key in op.spec.static_keys]
    sizes = tuple(sorted(set(arguments.sizes)))
    jobs = [
        Job(op, twin, dict(zip(op.spec.static_keys, values, strict=True)), dtype, sizes)
        for values in itertools.product(*grid)
        for dtype in arguments.dtypes
        for twin in arguments.twin
        if twin not in op.untuned
    ]
    return sorted(jobs, key=lambda job: -op.bytes_moved(job.case(max(job.sizes))))


def open_log(folder: Path, job: Job, device: Device) -> TuningLog:
    identity = {"device": device.name} | environment.twin_identity(job.twin)
    return TuningLog(folder / job.op.name / f"{job}.jsonl", identity)


def _deadline(start: float, limit_s: float | None) -> Callable[[], bool]:
    return lambda: limit_s is not None and time.perf_counter() - start > _COMPILING * limit_s


def write(job: Job, device: Device, logs: Path, folder: Path, stopped: bool = False) -> Path | None:
    """The job's table from the logs of both twins, as far as they are complete; None if neither is.

    Two processes that tune a twin each thus write one table: whoever is last finds both. `stopped`: also of a log that is
    not complete the rows that are measured and checked.
    """
    best: dict[str, Mapping[int, tables.Winner]] = {}
    unfinished: dict[str, str] = {}
    for twin in TWINS:
        if twin in job.op.untuned:
            continue
        half = Job(job.op, twin, job.statics, job.dtype, job.sizes)
        log = open_log(logs, half, device)
        complete = is_complete(log, job.sizes)
        if not complete and not stopped:
            continue
        chosen = (winners.from_log if complete else winners.checked_so_far)(log, job.sizes) or {}
        if not chosen:
            continue
        best[twin] = {size: tables.Winner(config, log.times[size][config]) for size, config in chosen.items()}
        counted = tried(half, log)
        if not complete or counted < len(half.candidates):
            unfinished[twin] = f"{counted} of {len(half.candidates)} configs, {len(chosen)} of {len(job.sizes)} sizes"
    if not best:
        return None
    path = tables.table_path(folder, job.op.spec, device, job.dtype, job.statics)
    tables.update(
        path,
        job.op.spec,
        job.statics,
        device,
        job.dtype,
        winners=best,
        tuned_at={size: {key: job.case(size).dims[key] for key in job.op.spec.tuned_at} for size in job.sizes},
        metadata=_metadata(best) | {"unfinished": unfinished or None},
    )
    return path


def _metadata(twins: Mapping[str, object]) -> dict[str, str]:
    versions = environment.versions()
    compilers = {"triton": ("triton", "torch"), "pallas": ("jax",)}
    return {
        **{f"{name}_version": versions[name] for twin in twins for name in compilers[twin]},
        "driver": versions["driver"],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": environment.command(),
    }
