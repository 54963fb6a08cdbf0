"""`python -m benchmarks start`: how long the first call takes, with empty caches and with full ones.

Every operator and implementation gets a fresh process and an empty folder for the caches of Triton, JAX, the CUDA driver and
torch, then another process with the folder as the first one left it. A row of the result says how long the import took
("import"), or how long it was from the first call to its result with empty ("cold") or full ("warm") caches, and how many
kernels were compiled. `warmup` is one more operator: the call that warms all layers of a model, of either package.

Rows take the place of earlier ones of the same operator and implementation; other rows of the file stay.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from parity_tests.cases import Case, select

from . import environment, peers, runs, warmup_child
from .implementations import OWN
from .machine import this_machine
from .op import BenchOp
from .ops import OPS, STAGES
from .run_command import RESULTS

# What a model calls; stages are parts of these, and measured where they are asked for.
CALLED = tuple(name for name in OPS if name not in STAGES)
WARMUP = "warmup"
_TIMEOUT_S = 900


@dataclass(frozen=True)
class StartRow:
    op: str
    implementation: str
    phase: str
    """"import", "cold" or "warm"."""
    seconds: float
    compiles: int | None
    """Kernels or programs that no cache held; None for an import."""
    case: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_choices(parser, __doc__, (*OPS, WARMUP))
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of each (default: 3)")


def add_choices(parser: argparse.ArgumentParser, about: str | None, ops: Iterable[str] = OPS) -> None:
    """What `start` and `host` have in common."""
    parser.description, parser.formatter_class = about, argparse.RawDescriptionHelpFormatter
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(ops)}; default: all but stages")
    parser.add_argument(
        "--implementations", nargs="+", metavar="NAME", help=f"only these, of {', '.join(OWN)} and peer:<name>"
    )
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/<device>)")
    parser.add_argument("--note", metavar="TEXT", help="kept with the rows: what else the machine does meanwhile, say")


def validate(arguments: argparse.Namespace) -> None:
    check_choices(arguments, WARMUP)
    if arguments.repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, got {arguments.repeats}")


def check_choices(arguments: argparse.Namespace, *besides: str) -> None:
    """And fills in what was left open. `besides`: what is measured beside operators."""
    for op in arguments.ops:
        if op not in (*OPS, *besides):
            raise ValueError(f"op: expected some of {', '.join((*OPS, *besides))}, got {op}")
    arguments.ops = arguments.ops or [*CALLED, *besides]
    known = known_implementations(arguments.ops)
    for name in arguments.implementations or ():
        if name not in known:
            raise ValueError(f"--implementations: expected some of {', '.join(known)}, got {name}")


def known_implementations(ops: Sequence[str]) -> list[str]:
    found = (peer.implementation for op in ops if op in OPS for peer in OPS[op].peers)
    return list(dict.fromkeys([*OWN, *found]))


def main(arguments: argparse.Namespace) -> int:
    device = this_machine("events").target.table_name
    path = (arguments.out or RESULTS / device) / "start.json"
    rows, failures, versions, earlier = [], [], environment.versions(), runs.read(path, device)
    todo = []
    for op in arguments.ops:
        every = warmup_child.PACKAGES if op == WARMUP else _implementations(op, versions)
        names = [name for name in every if name in (arguments.implementations or every)]
        todo += [(op, name) for name in names for _ in range(arguments.repeats)]
    try:
        for op, name in tqdm(todo, unit="start", disable=None):
            try:
                rows += start(op, name)
            except NotImplementedError as error:
                print(f"{op}: {name} is left out: {error}")
            except RuntimeError as error:
                failures.append(str(error))
    finally:  # what was measured before a crash is worth having
        keys, said = ("op", "implementation"), environment.command()
        runs.write(path, "start", device, earlier, versions, said, rows, keys, arguments.note)
        print(path)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def _implementations(op: str, versions: dict[str, str]) -> list[str]:
    """Those that can be measured here; the peers' versions."""
    present, missing = peers.find(OPS[op].peers)
    for peer, reason in missing.items():
        print(f"{op}: {peer.implementation} is missing: {reason}")
    versions |= {peer.name: peer.version() for peer in present}
    return [*OPS[op].own, *(peer.implementation for peer in present if peer.takes(case_of(OPS[op])))]


def case_of(op: BenchOp) -> Case:
    """A model's shape; where the registry has none, the smallest of the op's first sweep."""
    if cases := select(op=op.operator, tags=("standard",)):
        return cases[0]
    sweep = next(iter(op.sweeps.values()))
    return sweep.case(min(sweep.sizes), op.run_dtypes[0])


def start(op: str, implementation: str) -> Iterator[StartRow]:
    """The rows of one start with empty caches and of one with full ones."""
    case = warmup_child.CASE if op == WARMUP else case_of(OPS[op]).name
    with tempfile.TemporaryDirectory(prefix="start-") as folder:
        for phase in ("cold", "warm"):
            found = _child(op, implementation, folder)
            yield StartRow(op, implementation, "import", found["import"], None, case)
            yield StartRow(op, implementation, phase, found["first"], int(found["compiles"]), case)


def caches(folder: str) -> dict[str, str]:
    """The environment under which all caches that a first call may fill are in `folder`."""
    return {
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "CUDA_CACHE_PATH": f"{folder}/cuda",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TORCH_EXTENSIONS_DIR": f"{folder}/extensions",
        "XDG_CACHE_HOME": f"{folder}/cache",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


def _child(op: str, implementation: str, folder: str) -> Mapping[str, float]:
    module = "warmup_child" if op == WARMUP else "start_child"
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", op, implementation]
    variables = os.environ | caches(folder) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=variables, cwd=Path(__file__).parents[1]
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{op}, {implementation}: no result after {_TIMEOUT_S} s") from None
    if done.returncode or not done.stdout.strip():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        kind, _, reason = last.partition(": ")
        if kind.endswith(("NotImplementedError", "Unsupported")):
            raise NotImplementedError(reason)
        raise RuntimeError(f"{op}, {implementation}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])
