"""`python -m benchmarks transfer <op>`: how well a tuned row serves where it was not tuned.

At sizes of each of this device's tables, each twin runs with

    own              the row it was tuned to
    twin             the other twin's row: on Pallas by the operator's rule for Triton's knobs, on Triton with the knobs that
                     both have in common where Triton may have that value, the rest from the heuristic
    heuristic        the written rule
    device:<name>    the row that a table of another device would give
    vllm             the row of vLLM's own table, where vLLM can be imported

Every config is checked against the float64 definition before it is timed, and configs of one size are timed in turns.

`transfer.json` holds {operator: {"versions", "date", "command", "rows": [row, …]}} under "runs". A row:
{"statics", "dtype", "size", "twin", "origin", "knobs", "us", "us_p20", "us_p80", "error", "wrong"}; `us` is null where
`wrong` says what is.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from parity_tests.cases import Case
from ssm_configs import Device, Entry, TableError, architecture, read_table, shipped_tables
from ssm_configs.spec import TWINS, Knobs, OpSpec, Statics, check_knobs

from . import environment, peers
from .implementations import OWN
from .lab import Lab
from .machine import Machine, this_machine
from .op import BenchOp, Storage
from .ops import OPS
from .run_command import RESULTS
from .timing import CLOCKS, Sample
from .tune import floor_us, repeats
from .tune_command import TUNED
from .tuning_log import Config, config_of

FILE = "transfer.json"


@dataclass(frozen=True, kw_only=True)
class Row:
    statics: Mapping[str, int]
    dtype: str
    size: int
    twin: str
    origin: str
    knobs: Knobs
    us: float | None = None
    us_p20: float | None = None
    us_p80: float | None = None
    error: float | None = None
    """The largest relative error of the results against float64."""
    wrong: str | None = None


class Bench(Protocol):
    """What is needed of a `Lab`."""

    def compile(self, pairs: Sequence[tuple[Case, Knobs | None]]) -> None: ...

    def check(self, case: Case, knobs: Knobs | None) -> tuple[str | None, dict[str, float]]: ...

    def time(self, case: Case, configs: Sequence[Knobs], repeats: int) -> list[Sample]: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ops = parser.add_subparsers(dest="op", required=True, metavar="op")
    for op in OPS.values():
        command = ops.add_parser(
            op.name, help=f"of {op.name}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for key in op.spec.static_keys:
            command.add_argument(f"--{key}", type=int, nargs="+", metavar="N", help="only tables of these")
        command.add_argument("--twin", nargs="+", default=TWINS, choices=TWINS)
        command.add_argument("--sizes", type=int, nargs="+", default=op.first_sizes, metavar="N", help=op.spec.size_key)
        command.add_argument("--clock", choices=CLOCKS, default="kineto", help="events: no profiler, but Triton only")
        command.add_argument("--out", type=Path, help="folder (default: benchmarks/results/<device>)")


def validate(arguments: argparse.Namespace) -> None:
    """ValueError for what argparse cannot see."""
    if arguments.clock == "events" and "pallas" in arguments.twin:
        raise ValueError("--clock events cannot time JAX: add --twin triton")
    op = OPS[arguments.op]
    for size in arguments.sizes:
        op.case(size, {key: values[0] for key, values in op.grid.items()}, (op.tuned_dtypes or op.spec.dtypes)[0])


def main(arguments: argparse.Namespace) -> int:
    return run(OPS[arguments.op], arguments, this_machine(arguments.clock))


def run(op: BenchOp, arguments: argparse.Namespace, machine: Machine) -> int:
    tables = [
        table
        for table in shipped_tables(op.name)
        if table.device_name == machine.target.table_name
        and all(table.statics[key] in (getattr(arguments, key) or [table.statics[key]]) for key in op.spec.static_keys)
    ]
    if not tables:
        print(f"{op.name}: no table of {machine.target.table_name} to compare with", file=sys.stderr)
        return 1
    storage = Storage(machine.device)
    for twin in arguments.twin:
        if twin in op.untuned:
            print(f"{op.name}: {twin} reads no table: {op.untuned[twin]}")
    twins = [twin for twin in arguments.twin if twin not in op.untuned]
    labs = {twin: Lab(op, OWN[TUNED[twin]](machine.device), machine.clock, storage) for twin in twins}
    rows: list[Row] = []
    try:
        for table in tqdm(tables, unit="table", disable=None):
            for twin, lab in labs.items():
                found = {
                    size: origins(
                        op.spec, twin, machine.target, table.statics, table.dtype, size, vllm_table(op, table.path)
                    )
                    for size in sorted(set(arguments.sizes), reverse=True)
                }
                cases = {size: op.case(size, table.statics, table.dtype) for size in found}
                lab.compile([(cases[size], knobs) for size in found for knobs in found[size].values()])
                for size, of_size in found.items():
                    rows += measure(op, lab, cases[size], table.statics, table.dtype, size, twin, of_size)
                lab.forget()
    finally:  # what was measured before a crash is worth having
        path = (arguments.out or RESULTS / machine.target.table_name) / FILE
        write(path, op.name, machine.target.table_name, _versions(op, rows), environment.command(), rows)
        print(path)
    wrong = [row for row in rows if row.wrong]
    for row in wrong:
        print(f"FAILED {row.twin} {row.origin} {row.statics} {row.dtype} {row.size}: {row.wrong}", file=sys.stderr)
    # A row that does not run elsewhere is a finding; one that does not run at home is a failure.
    return 1 if any(row.origin == "own" for row in wrong) else 0


def origins(
    spec: OpSpec, twin: str, device: Device, statics: Statics, dtype: str, size: int, vllm: Path | None = None
) -> dict[str, Knobs]:
    """The launch knobs that each origin has for `twin`; what has none for this table is left out."""
    rule = spec.heuristic(statics, dtype, device, size)
    found: dict[str, Knobs] = {}
    tables = {table.device_name: table for table in shipped_tables(spec.name)
              if (table.statics, table.dtype) == (dict(statics), dtype)}  # fmt: skip
    entries = {name: read_table(table.path, spec, statics).nearest(size) for name, table in tables.items()}
    if own := entries.pop(device.table_name, None):
        found["own"] = spec.launch_knobs(twin, own.shared, own.own.get(twin), statics)
        found["twin"] = borrowed(spec, twin, own, rule, statics)
    found["heuristic"] = spec.launch_knobs(twin, rule, None, statics)
    for name, entry in entries.items():
        if (target := _architecture(name)) is not None and target.startswith("sm_"):
            found[f"device:{name}"] = spec.launch_knobs(twin, entry.shared, entry.own.get(twin), statics)
    if vllm is not None:
        with contextlib.suppress(TableError):  # theirs to say what a table of theirs is
            entry = read_table(vllm, spec, statics).nearest(size)
            found["vllm"] = spec.launch_knobs(twin, entry.shared, None, statics)
    return found


def borrowed(spec: OpSpec, twin: str, entry: Entry, rule: Knobs, statics: Statics) -> Knobs:
    """The other twin's row, as `twin` can launch it."""
    if twin == "pallas":
        return spec.launch_knobs(
            "pallas", spec.launch_knobs("triton", entry.shared, entry.own.get("triton"), statics), None, statics
        )
    other = spec.launch_knobs("pallas", entry.shared, entry.own.get("pallas"), statics)
    knobs = dict(rule)
    for knob in spec.triton_knobs:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            check_knobs((knob,), {knob.name: other[knob.name]}, statics)
            knobs[knob.name] = other[knob.name]
    return knobs


def vllm_table(op: BenchOp, shipped: Path) -> Path | None:
    """vLLM's file of this name, or None."""
    own = tuple(peer for peer in op.peers if peer.name == "vllm")
    if not op.spec.vllm_compatible or not own or not peers.find(own)[0]:
        return None
    module = importlib.util.find_spec(own[0].module)
    if module is None or module.origin is None:
        return None
    path = Path(module.origin).parent / "configs" / op.name / shipped.name
    return path if path.exists() else None


def measure(
    op: BenchOp,
    bench: Bench,
    case: Case,
    statics: Statics,
    dtype: str,
    size: int,
    twin: str,
    found: Mapping[str, Knobs],
) -> Iterator[Row]:
    """A row for every origin. Origins with the same knobs share one measurement."""
    configs = {config_of(knobs): knobs for knobs in found.values()}
    verdicts = {config: bench.check(case, knobs) for config, knobs in configs.items()}
    right = [config for config, (wrong, _) in verdicts.items() if wrong is None]
    samples: dict[Config, Sample] = {}
    if right:
        timed = bench.time(case, [configs[config] for config in right], repeats(floor_us(op, case)))
        samples = dict(zip(right, timed, strict=True))
    for origin, knobs in found.items():
        config = config_of(knobs)
        wrong, errors = verdicts[config]
        sample = samples.get(config)
        yield Row(
            statics=dict(statics), dtype=dtype, size=size, twin=twin, origin=origin, knobs=knobs,
            us=sample and sample.us, us_p20=sample and sample.us_p20, us_p80=sample and sample.us_p80,
            error=max(errors.values(), default=None), wrong=wrong,
        )  # fmt: skip


def write(
    path: Path, op: str, device: str, versions: Mapping[str, str], command: str, rows: Iterable[Row]
) -> None:  # fmt: skip
    """The operator's run, in place of an earlier one; other operators' runs stay."""
    data: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"device": device, "runs": {}}
    data["runs"][op] = {
        "versions": dict(versions),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(_text(data), "utf-8")
    os.replace(temporary, path)


def read(path: Path) -> dict[str, tuple[dict[str, Any], list[Row]]]:
    """Per operator: everything but the rows, and the rows. ValueError where the file is none of these."""
    try:
        runs = json.loads(path.read_text("utf-8"))["runs"]
        return {
            op: ({key: run[key] for key in ("versions", "date", "command")}, [Row(**row) for row in run["rows"]])
            for op, run in runs.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no result file of `transfer`: {error!r}") from error


def _versions(op: BenchOp, rows: Iterable[Row]) -> dict[str, str]:
    """With that of a peer whose table was measured."""
    used = {row.origin for row in rows}
    return environment.versions() | {peer.name: peer.version() for peer in op.peers if peer.name in used}


def _text(data: Mapping[str, Any]) -> str:
    """Rows a line each."""
    runs = []
    for op, run in data["runs"].items():
        head = [f"      {json.dumps(key)}: {json.dumps(value)}" for key, value in run.items() if key != "rows"]
        body = ",\n".join(f"        {json.dumps(row, allow_nan=False)}" for row in run["rows"])
        runs.append(
            f"    {json.dumps(op)}: {{\n" + ",\n".join([*head, f'      "rows": [\n{body}\n      ]']) + "\n    }"
        )
    return f'{{\n  "device": {json.dumps(data["device"])},\n  "runs": {{\n' + ",\n".join(runs) + "\n  }\n}\n"


def _architecture(table_name: str) -> str | None:
    try:
        return architecture(table_name)
    except ValueError:
        return None
