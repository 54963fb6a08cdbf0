"""`python -m benchmarks run <op>`: both twins, XLA, the peers and the copy ceiling, one process, one clock.

`run stages [op …]`: the stages of the chunked operators one after the other, a result file each.

At every shape each implementation's values are checked against the float64 definition first; one that is wrong is not
timed. Implementations take turns within a shape.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from parity_tests.cases import Case, select
from ssm_configs import Device, explain

from . import environment, peers, plot, results, stages
from .implementations import OWN, Implementation, of_peer
from .lab import Lab
from .machine import Machine, this_machine
from .op import BenchOp, Storage
from .ops import OPS
from .results import Row
from .timing import CLOCKS, copy_call, host_us
from .tune import floor_us

RESULTS = Path(__file__).parent / "results"
# bytes of one buffer; a copy reads and writes it
COPY_SIZES = tuple(1 << power for power in (24, 26, 28, 30, 31, 32))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ops = parser.add_subparsers(dest="op", required=True, metavar="op")
    for op in OPS.values():
        command = ops.add_parser(
            op.name, help=f"time {op.name}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        lines = [f"{name} ({', '.join(map(str, sweep.sizes))})" for name, sweep in op.sweeps.items()]
        command.add_argument("--sweeps", nargs="*", default=list(op.sweeps), choices=list(op.sweeps), metavar="NAME",
                             help=f"only these, of: {'; '.join(lines)}")  # fmt: skip
        command.add_argument("--sizes", type=int, nargs="+", metavar="N", help="in place of each sweep's own")
        dtypes = (*op.spec.dtypes, *op.spec.dtype_aliases)
        command.add_argument("--dtypes", nargs="+", default=op.run_dtypes, choices=dtypes, help=op.spec.dtype_key)
        names = (*op.own, *(peer.implementation for peer in op.peers))
        command.add_argument("--implementations", nargs="+", default=names, choices=names, help="only these")
        command.set_defaults(peers_figures=None)
        if op.quoted_as:
            command.add_argument(
                "--peers-figures", type=Path, metavar="JSONL", help="quoted for peers that are not installed"
            )
        _add_common(command)
    _add_common(stages.add_parser(ops, "time", __doc__))


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--no-cases", action="store_true", help="the sweeps alone, without the models' shapes")
    command.add_argument("--clock", choices=CLOCKS, default="kineto", help="events: no profiler, but torch only")
    command.add_argument("--out", type=Path, help="folder (default: benchmarks/results/<device>)")


def validate(arguments: argparse.Namespace) -> None:
    """ValueError or OSError for what argparse cannot see."""
    if arguments.op == stages.NAME:
        return stages.validate(arguments)
    op = OPS[arguments.op]
    cases = sweep(op, arguments.sweeps, arguments.sizes, arguments.dtypes)
    if arguments.peers_figures:
        results.quoted(op, cases, arguments.peers_figures, [])


def main(arguments: argparse.Namespace) -> int:
    machine = this_machine(arguments.clock)
    if arguments.op == stages.NAME:
        return stages.each(arguments.ops, lambda name: run(OPS[name], _defaults(OPS[name], arguments), machine))
    return run(OPS[arguments.op], arguments, machine)


def _defaults(op: BenchOp, arguments: argparse.Namespace) -> argparse.Namespace:
    """What `run` of this one operator would have without further words."""
    names = (*op.own, *(peer.implementation for peer in op.peers))
    own = {"sweeps": list(op.sweeps), "sizes": None, "dtypes": op.run_dtypes, "implementations": names}
    return argparse.Namespace(**{**vars(arguments), **own, "op": op.name, "peers_figures": None})


def run(op: BenchOp, arguments: argparse.Namespace, machine: Machine) -> int:
    present, missing = peers.find(op.peers)
    for peer, reason in missing.items():
        print(f"{peer.implementation} is missing: {reason}")
    implementations: dict[str, Implementation] = {name: OWN[name](machine.device) for name in op.own}
    for peer, function in present.items():
        implementations[peer.implementation] = of_peer(machine.device, peer, function)
    for name, implementation in list(implementations.items()):
        if name not in arguments.implementations:
            del implementations[name]
        elif not machine.clock.supports(implementation.framework):
            print(f"{name} is left out: the {arguments.clock} clock cannot time it")
            del implementations[name]

    cases = sweep(op, arguments.sweeps, arguments.sizes, arguments.dtypes)
    if not arguments.no_cases:
        cases += select(op=op.operator, tags=("standard",))
    rows, failures = ceiling(machine), []
    path = (arguments.out or RESULTS / machine.target.table_name) / f"{op.name}.json"
    try:
        measure(op, cases, implementations, machine, rows, failures)
    finally:  # what was measured before a crash is worth having
        if arguments.peers_figures:
            rows += results.quoted(op, cases, arguments.peers_figures, [peer.name for peer in missing])
        results.set_floors(rows)
        versions = environment.versions() | {peer.name: peer.version() for peer in present}
        results.write(path, op.name, machine.target.table_name, versions, environment.command(), rows)
        print(path)
    if op.drawn:
        for written in plot.draw(path):
            print(written)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def sweep(op: BenchOp, names: Sequence[str], sizes: Sequence[int] | None, dtypes: Sequence[str]) -> list[Case]:
    """The cases of these sweeps, at their own sizes unless told others."""
    # largest first: its buffers then serve the others
    return [
        op.sweeps[name].case(size, dtype)
        for dtype in dtypes
        for name in names
        for size in sorted(sizes or op.sweeps[name].sizes, reverse=True)
    ]


def ceiling(machine: Machine) -> list[Row]:
    """Copies of several sizes, by the same clock as everything else."""
    rows = []
    for size in COPY_SIZES:
        (sample,) = machine.clock.cold_us([copy_call(size, machine.device)], repeats=10)
        rows.append(
            Row(
                case=f"copy {size >> 20} MiB",
                dims={"bytes": size},
                implementation=results.CEILING,
                us=sample.us,
                us_p20=sample.us_p20,
                us_p80=sample.us_p80,
                bytes=2 * size,
                kernels=sample.kernels,
            )
        )
    torch.cuda.empty_cache()
    return rows


def measure(
    op: BenchOp,
    cases: Sequence[Case],
    implementations: Mapping[str, Implementation],
    machine: Machine,
    rows: list[Row],
    failures: list[str],
) -> None:
    """Appends to `rows` and, what went wrong in words, to `failures`."""
    storage = Storage(machine.device)
    labs = {name: Lab(op, one, machine.clock, storage) for name, one in implementations.items()}
    for name, lab in labs.items():
        taken = [(case, None) for case in cases if lab.implementation.takes(case)]
        start = time.perf_counter()
        lab.compile(taken)
        print(f"{name}: {len(taken)} cases compiled in {time.perf_counter() - start:.1f} s", flush=True)
    for case in tqdm(cases, unit="case", disable=None):
        errors: dict[str, float] = {}
        for name, lab in labs.items():
            if not lab.implementation.takes(case):
                continue
            wrong, found = lab.check(case, None)
            if wrong is None:
                errors[name] = max(found.values())
            else:
                failures.append(f"{name}: {case}: {wrong}")
        if not errors:
            continue
        calls = [labs[name].call(case) for name in errors]
        samples = machine.clock.cold_us(calls, repeats=30 if floor_us(op, case) < 200 else 15)
        for call, sample in zip(calls, samples, strict=True):
            rows.append(
                Row(
                    case=case.name,
                    dims=results.dims_of(op, case),
                    implementation=call.label,
                    us=sample.us,
                    us_p20=sample.us_p20,
                    us_p80=sample.us_p80,
                    host_us=host_us(call),
                    bytes=op.bytes_moved(case),
                    flops=op.flops(case),
                    error=errors[call.label],
                    config=_config(op, call.label, case, machine.target),
                    kernels=sample.kernels,
                )
            )


def _config(op: BenchOp, name: str, case: Case, target: Device) -> dict[str, Any] | None:
    """The launch knobs and the rule that gave them, for the implementations that read our tables."""
    twin = {"triton": "triton", "mosaic_gpu": "pallas"}.get(name)
    if twin is None or twin in op.untuned:
        return None
    size, statics = op.table_key(case)
    config = explain(op.name, twin=twin, device=target, dtype=op.dtype_of(case), size=size, **statics).config
    return {**config.knobs, "source": config.source, "key": config.key}
