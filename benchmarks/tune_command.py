"""`python -m benchmarks tune <op>`: jobs, logs and tables around the tuner."""

import argparse
import datetime
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from ssm_configs import Device
from ssm_configs.search import SHIPPED
from ssm_configs.spec import TWINS

from . import environment, tables, winners
from .implementations import Implementation, JaxTwin, TritonTwin
from .lab import Lab
from .op import BenchOp, Storage
from .ops import OPS
from .timing import CLOCKS
from .tune import Job, TuningError, estimate_seconds, is_complete, tune
from .tuning_log import TuningLog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ops = parser.add_subparsers(dest="op", required=True, metavar="op")
    for op in OPS.values():
        command = ops.add_parser(op.name, help=f"tables of {op.name}", description=__doc__)
        for key in op.spec.static_keys:
            command.add_argument(f"--{key}", type=int, nargs="+", default=op.grid[key], metavar="N")
        command.add_argument(
            f"--{op.spec.dtype_key.replace('_', '-')}", dest="dtypes", nargs="+", default=op.spec.dtypes,
            choices=op.spec.dtypes,
        )  # fmt: skip
        command.add_argument("--twin", nargs="+", default=TWINS, choices=TWINS)
        command.add_argument("--sizes", type=int, nargs="+", default=op.sizes, metavar="N", help=op.spec.size_key)
        command.add_argument("--tables", type=Path, default=SHIPPED, help="where the tables go (default: %(default)s)")
        command.add_argument("--log", type=Path, default=Path("tuning-log"), help="measurements so far; resumes there")


def main(arguments: argparse.Namespace) -> int:
    op = OPS[arguments.op]
    jobs = plan(op, arguments)
    device = torch.device("cuda")
    target = Device(environment.device_name(device), torch.cuda.get_device_capability(device))
    storage, clock = Storage(device), CLOCKS["kineto"](device)
    seconds = sum(estimate_seconds(job, static_shapes=job.twin == "pallas") for job in jobs)
    print(f"{len(jobs)} jobs on {target.name}, about {seconds / 60:.1f} minutes; log in {arguments.log}", flush=True)

    failed = 0
    with tqdm(total=sum(len(job.candidates) * len(job.sizes) for job in jobs), unit="config", smoothing=0.1) as bar:
        for number, job in enumerate(jobs):
            bar.set_description(str(job))
            lab = Lab(op, _implementation(job.twin, device), clock, device, storage)
            log = open_log(arguments.log, job, target)
            try:
                tune(job, lab, log, bar.update)
            except TuningError as error:
                failed += 1
                bar.write(f"error: {error}")
            bar.n = sum(len(done.candidates) * len(done.sizes) for done in jobs[: number + 1])
            lab.forget()
            path = write(job, target, arguments.log, arguments.tables)
            bar.write(f"{job}: {path or 'no table, nothing complete'}")
    return 1 if failed else 0


def plan(op: BenchOp, arguments: argparse.Namespace) -> list[Job]:
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
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
    }


def _implementation(twin: str, device: torch.device) -> Implementation:
    return TritonTwin(device) if twin == "triton" else JaxTwin("mosaic_gpu")
