"""`python -m benchmarks host`: what a call costs the host, apart from what the device does.

Microseconds from the call to its return, the median, with nobody waiting for the device: for torch the operator itself, for JAX
the dispatch of the operator under `jax.jit`. And what is left of it where torch captures the call in a CUDA graph, as servers
do: one replay with a cold L2 cache, from the launch of the graph to its end.

A row takes the place of an earlier one of the same operator, implementation and case; other rows of the file stay.
"""

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from parity_tests.cases import Case, select

from . import environment, peers, runs
from .implementations import OWN, Implementation, JaxOperands, TorchOperands, of_peer
from .machine import Machine, this_machine
from .op import BenchOp, Storage, draw
from .ops import OPS
from .run_command import RESULTS
from .start_command import add_choices, case_of, check_choices
from .timing import host_us, replay_us


@dataclass(frozen=True)
class HostRow:
    op: str
    implementation: str
    case: str
    us: float
    replay_us: float | None
    """Of torch's only, and None where a call cannot be captured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_choices(parser, __doc__)
    parser.add_argument("--calls", type=int, default=500, metavar="N", help="of each (default: 500)")
    parser.add_argument("--all-cases", action="store_true", help="every model's shape, not only the first")


def validate(arguments: argparse.Namespace) -> None:
    check_choices(arguments)
    if arguments.calls < 1:
        raise ValueError(f"--calls: expected at least 1, got {arguments.calls}")


def main(arguments: argparse.Namespace) -> int:
    machine = this_machine("events")
    device = machine.target.table_name
    path = (arguments.out or RESULTS / device) / "host.json"
    rows, failures, versions, earlier = [], [], environment.versions(), runs.read(path, device)
    try:
        for name in arguments.ops:
            measure_op(OPS[name], arguments, machine, rows, failures, versions)
    finally:  # what was measured before a crash or a time limit is worth having
        keys = ("op", "implementation", "case")
        runs.write(path, "host", device, earlier, versions, environment.command(), rows, keys, arguments.note)
        print(path)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def measure_op(
    op: BenchOp,
    arguments: argparse.Namespace,
    machine: Machine,
    rows: list[HostRow],
    failures: list[str],
    versions: dict[str, str],
) -> None:
    """Appends to `rows` and, what went wrong in words, to `failures`; the peers' versions to `versions`."""
    present, missing = peers.find(op.peers)
    for peer, reason in missing.items():
        print(f"{op.name}: {peer.implementation} is missing: {reason}")
    versions |= {peer.name: peer.version() for peer in present}
    implementations: dict[str, Implementation] = {own: OWN[own](machine.device) for own in op.own}
    for peer, function in present.items():
        implementations[peer.implementation] = of_peer(machine.device, peer, function)
    cases = (select(op=op.operator, tags=("standard",)) if arguments.all_cases else []) or [case_of(op)]
    for label, implementation in implementations.items():
        if arguments.implementations and label not in arguments.implementations:
            continue
        for case in (case for case in cases if implementation.takes(case)):
            try:
                rows.append(measure(op, case, implementation, machine, arguments.calls))
            except NotImplementedError as error:
                print(f"{op.name}: {label} is left out: {error}")
            except Exception as error:
                failures.append(f"{op.name}, {label}, {case}: {type(error).__name__}: {error}")


def measure(op: BenchOp, case: Case, implementation: Implementation, machine: Machine, calls: int) -> HostRow:
    storage = Storage(machine.device)
    initial = draw(op, case, storage)
    if implementation.framework == "jax":
        # Not a program compiled ahead, whose dispatch is another.
        made: Any = implementation
        call = made.bind(op, JaxOperands(op, initial), made.jitted(op, case), None)
    else:
        call = implementation.bind(op, TorchOperands(op, case, initial, storage), None, None)
    for _ in range(3):  # compiles, then settles
        call.issue()
        call.wait()
    us = host_us(call, calls)
    return HostRow(op.name, implementation.name, case.name, us, replay_us(call, machine.device))
