"""The rows of this device's tuning tables, and what they gain over the written rule where the tuning logs hold both."""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ssm_configs import SPECS, Device, Entry, ShippedTable, architecture, read_table, shipped_tables
from ssm_configs.spec import TWINS, Knobs, OpSpec

from ..plot import name_of
from ..tune_command import TUNED
from ..tuning_log import TuningLog, config_of
from .blocks import Column, Section, Source, Table
from .figure import Line, Panel, draw


class Gain(NamedTuple):
    """One row of one table, for one twin."""

    table: ShippedTable
    entry: Entry
    twin: str
    knobs: Knobs
    us: float | None
    heuristic_us: float | None

    @property
    def speedup(self) -> float | None:
        return self.heuristic_us / self.us if self.us and self.heuristic_us else None


def section(op: str, device: str, logs: Path) -> Section | None:
    """None where this device has no table of `op`."""
    tables = [table for table in shipped_tables(op) if table.device_name == device]
    if op not in SPECS or not tables:
        return None
    spec = SPECS[op]
    found = [gain for table in tables for gain in gains(spec, table, logs / op)]
    sources = {table.path: _source(table, spec) for table in tables}
    together = (_logs(op, device, list(sources.values())),)
    made = Section(f"tuned-{op}", f"{op}: tuned rows", [_sentence(found, len(tables))])
    if spoken := [gain for gain in found if gain.speedup]:
        made.blocks += [[_picture(op, spec, spoken, together)], _summary(op, spoken, together)]
    made.blocks += [_table(table, found, sources[table.path]) for table in tables]
    return made


def gains(spec: OpSpec, table: ShippedTable, logs: Path) -> Iterator[Gain]:
    """Every row of a table for both twins. Times are those of the tuning log, None where it has none."""
    statics = ",".join(f"{key}={value}" for key, value in table.statics.items())
    for twin in TWINS:
        log = _log(logs / f"{statics},{spec.dtype_key}={table.dtype} {twin}.jsonl")
        for entry in read_table(table.path, spec, table.statics).entries:
            knobs = spec.launch_knobs(twin, entry.shared, entry.own.get(twin), table.statics)
            rule = spec.heuristic(table.statics, table.dtype, _device(table.device_name), entry.size)
            rule = spec.launch_knobs(twin, rule, None, table.statics)
            times = log.times.get(entry.size, {}) if log else {}
            by_rule = times.get(config_of(rule)) if log and entry.size in _complete(log) else None
            yield Gain(table, entry, twin, knobs, times.get(config_of(knobs)), by_rule)


def _log(path: Path) -> TuningLog | None:
    """The measurements of the last version of kernels and compilers that the log has times of."""
    if not path.exists():
        return None
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    identities = [record["identity"] for record in records if record["kind"] == "time"]
    return TuningLog(path, identities[-1]) if identities else None


def _complete(log: TuningLog) -> set[int]:
    """The sizes where every candidate was timed. Elsewhere the best of those were: a rule that is among them would always
    look good."""
    most = max(map(len, log.times.values()))
    return {size for size, times in log.times.items() if len(times) == most}


def _device(table_name: str) -> Device:
    """`table_name` with the capability by which heuristics tell devices apart."""
    target = (architecture(table_name) or "").removeprefix("sm_")
    return Device(table_name, (int(target[:-1]), int(target[-1])) if target.isdigit() else None)


def _source(table: ShippedTable, spec: OpSpec) -> Source:
    known = read_table(table.path, spec, table.statics).metadata
    versions = [f"{key.removesuffix('_version')} {value}" for key, value in known.items() if key.endswith("_version")]
    versions += [f"driver {known['driver']}"] if "driver" in known else []
    command = str(known.get("command", known.get("source", "")))
    name = f"configs/ssm_configs/tables/{spec.name}/{table.path.name}"
    return Source(name, table.device_name.replace("_", " "), command, str(known.get("date", "")), ", ".join(versions))


def _logs(op: str, device: str, tables: Sequence[Source]) -> Source:
    """What comes from all tables of an operator and their logs."""
    parts = {
        name: "; ".join(dict.fromkeys(getattr(one, name) for one in tables)) for name in ("command", "date", "versions")
    }
    return Source(f"tuning/{op}/*.jsonl and {len(tables)} tables", device.replace("_", " "), **parts)


def _sentence(found: Sequence[Gain], tables: int) -> str:
    said = f"{tables} tables, {len(found) // len(TWINS)} rows."
    if spoken := sum(gain.speedup is not None for gain in found):
        return (
            f"{said} The written rule is what runs where no table is. Its time is in the tuning logs for {spoken} of "
            f"{len(found)} choices (one a row and twin), counting only sizes where every candidate was timed: in Triton most, "
            "in JAX a few, for there each size is a compile of its own."
        )
    return f"{said} The tuning logs hold no time of the written rule's config to compare with."


def _picture(op: str, spec: OpSpec, found: Sequence[Gain], sources: Sequence[Source]):
    lines, spoken = [], []
    for twin in TWINS:
        sizes = sorted({gain.entry.size for gain in found if gain.twin == twin})
        of_size = {size: [gain.speedup for gain in found if gain.twin == twin and gain.entry.size == size
                          and gain.speedup is not None] for size in sizes}  # fmt: skip
        if sizes:
            name = name_of(TUNED[twin])
            points = [(float(size), statistics.median(of_size[size])) for size in sizes]
            band = [(min(of_size[size]), max(of_size[size])) for size in sizes]
            lines.append(Line(TUNED[twin], name, points, band=band))
            every = [one for size in sizes for one in of_size[size]]
            spoken.append(f"{name}: median {statistics.median(every):.2f}, largest {max(every):.2f}")
    alt = f"Speed-up of the tuned row over the written rule. {'; '.join(spoken)}."
    panel = Panel(
        f"{op}-tuned", f"{op}: tuned over the written rule", alt, spec.size_key, "speed-up: median and range", lines,
        [("no gain", 1.0)], from_zero=False,
    )  # fmt: skip
    return draw(panel, sources)


def _summary(op: str, found: Sequence[Gain], sources: Sequence[Source]) -> Table:
    """By static sizes and dtype."""
    lines = []
    for table in dict.fromkeys(gain.table.path for gain in found):
        for twin in TWINS:
            own = [gain for gain in found if gain.table.path == table and gain.twin == twin]
            speedups = [gain.speedup for gain in own if gain.speedup is not None]
            if speedups:
                statics = " ".join(f"{key}={value}" for key, value in own[0].table.statics.items())
                lines.append([
                    f"{statics}, {own[0].table.dtype}", name_of(TUNED[twin]), str(len(speedups)),
                    *(f"{pick(speedups):.2f}" for pick in (min, statistics.median, max)),
                ])  # fmt: skip
    columns = [
        Column("table", "text"),
        Column("twin", "text"),
        Column("rows"),
        Column("least"),
        Column("median"),
        Column("most"),
    ]
    return Table(
        f"{op}, speed-up of the tuned row over the written rule", columns, lines, sources, folded=len(lines) > 8
    )


def _table(table: ShippedTable, found: Sequence[Gain], source: Source) -> Table:
    lines = []
    for size in sorted({gain.entry.size for gain in found if gain.table == table}):
        own = {gain.twin: gain for gain in found if gain.table == table and gain.entry.size == size}
        cells = []
        for twin in TWINS:
            gain = own[twin]
            cells += [
                ", ".join(f"{name}={value}" for name, value in gain.knobs.items()),
                f"{gain.us:.2f}" if gain.us else "",
                f"{gain.speedup:.2f}" if gain.speedup else "",
            ]
        at = ", ".join(f"{key}={value}" for key, value in (own["triton"].entry.tuned_at or {}).items())
        lines.append([str(size), at, *cells])
    columns = [Column("size", "text"), Column("tuned at", "text")]
    for twin in TWINS:
        columns += [Column(f"{twin} launches", "code"), Column("µs"), Column("÷ rule")]
    statics = " ".join(f"{key}={value}" for key, value in table.statics.items())
    return Table(f"{statics}, {table.dtype}: chosen rows", columns, lines, (source,), folded=True)
