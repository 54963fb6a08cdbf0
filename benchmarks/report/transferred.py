"""How well a tuned row serves the other twin, and another device's table this one."""

import statistics
from collections.abc import Sequence

from ssm_configs.spec import TWINS

from ..plot import name_of
from ..transfer import Row
from ..tune_command import TUNED
from .blocks import Column, Section, Table
from .sources import Measured

_ORIGINS = {"own": "own", "twin": "the other twin's row", "heuristic": "the written rule", "vllm": "vLLM's own table"}


def section(op: str, measured: Measured) -> Section:
    rows: Sequence[Row] = measured.rows
    own = {_place(row): row for row in rows if row.origin == "own"}
    made = Section(
        f"transfer-{op}", f"{op}: rows from elsewhere",
        ["Time with a row that was tuned elsewhere, over the time with the row that was tuned for this twin on this device."],
    )  # fmt: skip
    made.blocks = [_summary(op, measured, own), _every(op, measured, own)]
    return made


def origin_name(origin: str) -> str:
    return _ORIGINS.get(origin, origin.removeprefix("device:").replace("_", " "))


def _summary(op: str, measured: Measured, own: dict[tuple[object, ...], Row]) -> Table:
    lines = []
    for twin in TWINS:
        for origin in dict.fromkeys(row.origin for row in measured.rows if row.twin == twin and row.origin != "own"):
            rows = [row for row in measured.rows if (row.twin, row.origin) == (twin, origin)]
            ratios = [ratio for row in rows if (ratio := _ratio(row, own))]
            cells = [f"{pick(ratios):.2f}" for pick in (min, statistics.median, max)] if ratios else ["", "", ""]
            lines.append(
                [
                    name_of(TUNED[twin]),
                    origin_name(origin),
                    *cells,
                    str(len(rows)),
                    str(sum(not row.us for row in rows)),
                ]
            )
    columns = [
        Column("on", "text"), Column("row from", "text"), Column("least"), Column("median"), Column("most"), Column("rows"),
        Column("do not run"),
    ]  # fmt: skip
    return Table(f"{op}, time over that of the own row", columns, lines, (measured.source,))


def _every(op: str, measured: Measured, own: dict[tuple[object, ...], Row]) -> Table:
    lines = []
    for row in measured.rows:
        statics = " ".join(f"{key}={value}" for key, value in row.statics.items())
        ratio = _ratio(row, own)
        lines.append([
            f"{statics}, {row.dtype}, {row.size}", name_of(TUNED[row.twin]), origin_name(row.origin),
            "" if row.us is None else f"{row.us:.2f}", f"{ratio:.2f}" if ratio else "",
            ", ".join(f"{name}={value}" for name, value in row.knobs.items()), row.wrong or "",
        ])  # fmt: skip
    columns = [
        Column("sizes", "text"), Column("on", "text"), Column("row from", "text"), Column("µs"), Column("÷ own"),
        Column("knobs", "code"), Column("does not run", "text"),
    ]  # fmt: skip
    return Table(f"{op}, every row from elsewhere", columns, lines, (measured.source,), folded=True)


def _place(row: Row) -> tuple[object, ...]:
    return *sorted(row.statics.items()), row.dtype, row.size, row.twin


def _ratio(row: Row, own: dict[tuple[object, ...], Row]) -> float | None:
    best = own.get(_place(row))
    return row.us / best.us if row.us and best is not None and best.us else None
