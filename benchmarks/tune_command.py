"""`python -m benchmarks tune <op>`: jobs, logs and tables around the tuner."""

import argparse
import datetime
import itertools
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from ssm_configs import Device
from ssm_configs.search import SHIPPED
from ssm_configs.spec import TWINS

from . import environment, tables, winners
from .implementations import OWN
from .lab import Lab
from .machine import Machine, this_machine
from .op import BenchOp, Storage
from .ops import OPS
from .timing import CLOCKS
from .tune import Job, TuningError, estimate_seconds, is_complete, timed_configs, tune
from .tuning_log import TuningLog

TUNED = {"triton": "triton", "pallas": "mosaic_gpu"}
"""The implementation that a twin's table entries launch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ops = parser.add_subparsers(dest="op", required=True, metavar="op")
    for op in OPS.values():
        command = ops.add_parser(op.name, help=f"tune {op.name}", description=__doc__)
        for key in op.spec.static_keys:
            command.add_argument(f"--{key}", type=int, nargs="+", default=op.grid[key], metavar="N")
        command.add_argument(
            f"--{op.spec.dtype_key.replace('_', '-')}", dest="dtypes", nargs="+", default=op.spec.dtypes,
            choices=op.spec.dtypes,
        )  # fmt: skip
        command.add_argument("--twin", nargs="+", default=TWINS, choices=TWINS)
        command.add_argument("--sizes", type=int, nargs="+", default=op.sizes, metavar="N", help=op.spec.size_key)
        command.add_argument("--clock", choices=CLOCKS, default="kineto", help="events: no profiler, but Triton only")
        command.add_argument("--tables", type=Path, default=SHIPPED, help="where the tables go (default: %(default)s)")
        command.add_argument("--log", type=Path, default=Path("tuning-log"), help="measurements so far; resumes there")


def validate(arguments: argparse.Namespace) -> None:
    """ValueError for what argparse cannot see."""
    if arguments.clock == "events" and "pallas" in arguments.twin:
        raise ValueError("--clock events cannot time JAX: add --twin triton")
    jobs_of(OPS[arguments.op], arguments)


def main(arguments: argparse.Namespace) -> int:
    return run(OPS[arguments.op], arguments, this_machine(arguments.clock))


def run(op: BenchOp, arguments: argparse.Namespace, machine: Machine) -> int:
    jobs, storage = jobs_of(op, arguments), Storage(machine.device)
    labs = {twin: Lab(op, OWN[TUNED[twin]](machine.device), machine.clock, storage) for twin in arguments.twin}
    seconds = sum(estimate_seconds(job, labs[job.twin].compiled_case) for job in jobs)
    print(
        f"{len(jobs)} jobs on {machine.target.name}, about {seconds / 60:.1f} minutes; log in {arguments.log}",
        flush=True,
    )

    failed = done = 0
    totals = [sum(timed_configs(job, labs[job.twin].compiled_case).values()) for job in jobs]
    # Without a terminal the line at the end of each job has to do.
    with tqdm(total=sum(totals), unit="config", smoothing=0.1, disable=None) as bar:
        for job, total in zip(jobs, totals, strict=True):
            bar.set_description(str(job))
            start = time.perf_counter()
            try:
                tune(job, labs[job.twin], open_log(arguments.log, job, machine.target), bar.update)
            except TuningError as error:
                failed += 1
                bar.write(f"error: {error}")
            labs[job.twin].forget()
            done += total
            bar.update(done - bar.n)  # some finalists were the same
            path = write(job, machine.target, arguments.log, arguments.tables)
            bar.write(f"{time.perf_counter() - start:6.1f} s  {job}: {path or 'no table, nothing complete'}")
    return 1 if failed else 0


def jobs_of(op: BenchOp, arguments: argparse.Namespace) -> list[Job]:
    """Largest states first: their buffers then serve all others, and what does not fit fails at once."""
    grid = [getattr(arguments, key) for key in op.spec.static_keys]
    sizes = tuple(sorted(set(arguments.sizes)))
    jobs = [
        Job(op, twin, dict(zip(op.spec.static_keys, values, strict=True)), dtype, sizes)
        for values in itertools.product(*grid)
        for dtype in arguments.dtypes
        for twin in arguments.twin
    ]
    return sorted(jobs, key=lambda job: -op.bytes_moved(job.case(max(job.sizes))))


def open_log(folder: Path, job: Job, device: Device) -> TuningLog:
    identity = {"device": device.name} | environment.twin_identity(job.twin)
    return TuningLog(folder / job.op.name / f"{job}.jsonl", identity)


def write(job: Job, device: Device, logs: Path, folder: Path) -> Path | None:
    """The job's table from the logs of both twins, as far as they are complete; None if neither is.

    Two processes that tune a twin each thus write one table: whoever is last finds both.
    """
    best: dict[str, Mapping[int, tables.Winner]] = {}
    for twin in TWINS:
        log = open_log(logs, Job(job.op, twin, job.statics, job.dtype, job.sizes), device)
        if is_complete(log, job.sizes):
            chosen = winners.from_log(log, job.sizes) or {}
            best[twin] = {size: tables.Winner(config, log.times[size][config]) for size, config in chosen.items()}
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
        metadata=_metadata(best),
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
