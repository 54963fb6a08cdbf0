"""Cold and warm start, compile counts, and what a call costs the host."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..ops import OPS, STAGES
from ..plot import name_of
from .blocks import Column, Section, Source, Table
from .sources import Measured, Results, implementations

_PHASES = {
    "import": "importing the package",
    "cold": "first call, empty caches",
    "warm": "first call, caches filled",
}


def sections(results: Results) -> list[Section]:
    return [section for section in (_start(results.start), _host(results)) if section is not None]


def _together(measured: Sequence[Measured]) -> tuple[list[Mapping[str, Any]], list[Source]]:
    """The rows of all runs with their run's note, operators in their own order, and where they come from."""
    place = {op: i for i, op in enumerate(OPS)}
    rows = [{"note": run.source.note, **row} for run in measured for row in run.rows]
    return sorted(rows, key=lambda row: place.get(row["op"], len(place))), [run.source for run in measured]


def _start(measured: Sequence[Measured]) -> Section | None:
    if not measured:
        return None
    rows, read_from = _together(measured)
    said = "Seconds in a fresh process: of the import, then from the first call to its result. Medians over repeats."
    made = Section("start", "Cold and warm start", [said])
    counted, noted = any("compiles" in row for row in rows), any(row["note"] for row in rows)
    lines = []
    for op, name in dict.fromkeys((row["op"], row["implementation"]) for row in rows):
        own = [row for row in rows if (row["op"], row["implementation"]) == (op, name)]
        cells = []
        for phase in _PHASES:
            seconds = [row["seconds"] for row in own if row["phase"] == phase]
            cells.append(f"{statistics.median(seconds):.2f}" if seconds else "")
        if counted:
            seen = [f"{row['phase']} {row['compiles']}" for row in own if row.get("compiles") is not None]
            cells.append(", ".join(dict.fromkeys(seen)))
        lines.append([op, name_of(name), *cells, ", ".join(dict.fromkeys(row.get("case", "") for row in own))])
        if noted:
            lines[-1].append(", ".join(dict.fromkeys(row["note"] for row in own)))
    columns = [
        Column("operator", "text"),
        Column("implementation", "text"),
        *(Column(text) for text in _PHASES.values()),
    ]
    if counted:
        columns.append(Column("kernels compiled", "text"))
    columns.append(Column("case", "text"))
    if noted:
        columns.append(Column("measured", "text"))
    made.blocks.append(Table("Seconds to the first result", columns, lines, read_from))
    return made


def _host(results: Results) -> Section | None:
    made = Section(
        "host", "Launch overhead", ["Host time of one call: what it takes to launch, without waiting for the device."]
    )
    if results.host:
        made.blocks.append(_hosts(results.host))
    for op, measured in results.ops.items():
        if table := _from_run(op, measured):
            made.blocks.append(table)
    return made if made.blocks else None


def _hosts(measured: Sequence[Measured]) -> Table:
    rows, read_from = _together(measured)
    lines, replayed = [], any(row.get("replay_us") is not None for row in rows)
    noted = any(row["note"] for row in rows)
    for row in rows:
        cells = [row["op"], name_of(row["implementation"]), row.get("case", ""), f"{row['us']:.1f}"]
        if replayed:
            replay = row.get("replay_us")
            cells.append("" if replay is None else f"{replay:.1f}")
        if noted:
            cells.append(row["note"])
        lines.append(cells)
    columns = [Column("operator", "text"), Column("implementation", "text"), Column("case", "text"), Column("µs")]
    if replayed:
        columns.append(Column("replay of a CUDA graph, cold L2, µs"))
    if noted:
        columns.append(Column("measured", "text"))
    return Table("Host time of one call, µs", columns, lines, read_from)


def _from_run(op: str, measured: Measured) -> Table | None:
    """What `run` saw on its way: over all shapes, for a launch does not depend on them."""
    lines = []
    for name in implementations(measured.rows):
        times: Sequence[float] = [row.host_us for row in measured.rows if row.implementation == name and row.host_us]
        if times:
            lines.append(
                [name_of(name), *(f"{pick(times):.1f}" for pick in (min, statistics.median, max)), str(len(times))]
            )
    if not lines:
        return None
    columns = [Column("implementation", "text"), Column("least"), Column("median"), Column("most"), Column("shapes")]
    caption = f"{op}, host time of one call over all shapes, µs"
    return Table(caption, columns, lines, (measured.source,), folded=op in STAGES)
