"""How well a tuned row serves the other twin, and another device's table this one: on the page, and in docs/tuning.md."""

import statistics
from collections.abc import Iterator, Mapping, Sequence

from ssm_configs import SPECS
from ssm_configs.spec import TWINS, Knobs

from ..plot import name_of
from ..transfer import Row
from ..tune_command import TUNED
from .blocks import Column, Section, Table
from .sources import Measured

BEGIN, END = "<!-- transfer -->\n", "<!-- /transfer -->"
BEATEN = 0.97
"""Of the own row's time: a row from elsewhere that takes less says that the table could be better."""
_Own = Mapping[tuple[object, ...], Row]
_ORIGINS = {"own": "own", "twin": "the other twin's row", "heuristic": "the written rule", "vllm": "vLLM's own table"}


def section(op: str, measured: Measured) -> Section:
    own = _own(measured.rows)
    size = f" Sizes are {SPECS[op].size_key}." if op in SPECS else ""
    made = Section(
        f"transfer-{op}", f"{op}: rows from elsewhere",
        [
            "Time with a row that was tuned elsewhere, over the time with the row that was tuned for this twin on this device. "
            "Triton takes from a Pallas row the knobs that both have, and the rest from the written rule; Pallas takes a "
            f"Triton row by the operator's own rule.{size}"
        ],
    )  # fmt: skip
    made.blocks = [_summary(op, measured, own)]
    if beaten := [row for row in _fastest(measured.rows) if (ratio := _ratio(row, own)) and ratio < BEATEN]:
        made.blocks.append(_beaten(op, measured, own, beaten))
    made.blocks.append(_every(op, measured, own))
    return made


def origin_name(origin: str) -> str:
    return _ORIGINS.get(origin, origin.removeprefix("device:").replace("_", " "))


def _summary(op: str, measured: Measured, own: _Own) -> Table:
    lines = []
    for twin in TWINS:
        for origin in dict.fromkeys(row.origin for row in measured.rows if row.twin == twin and row.origin != "own"):
            rows = [row for row in measured.rows if (row.twin, row.origin) == (twin, origin)]
            ratios = [ratio for row in rows if (ratio := _ratio(row, own))]
            cells = [f"{pick(ratios):.2f}" for pick in (statistics.median, max, min)] if ratios else ["", "", ""]
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
        Column("on", "text"), Column("row from", "text"), Column("median"), Column("most"), Column("least"), Column("rows"),
        Column("fail"),
    ]  # fmt: skip
    return Table(f"{op}, time over that of the own row", columns, lines, (measured.source,))


def _beaten(op: str, measured: Measured, own: _Own, beaten: Sequence[Row]) -> Table:
    lines = []
    for row in beaten:
        home = own[_place(row)]
        lines.append([
            _name(row), name_of(TUNED[row.twin]), origin_name(row.origin), f"{home.us:.2f}", f"{row.us:.2f}",
            f"{_ratio(row, own):.2f}", _words(home.knobs), _words(row.knobs),
        ])  # fmt: skip
    columns = [
        Column("sizes", "text"), Column("on", "text"), Column("row from", "text"), Column("own, µs"), Column("µs"),
        Column("÷ own"), Column("own knobs", "code"), Column("knobs", "code"),
    ]  # fmt: skip
    less = f"{1 - BEATEN:.0%}"
    return Table(f"{op}, own rows that another beats by more than {less}", columns, lines, (measured.source,))


def _every(op: str, measured: Measured, own: _Own) -> Table:
    lines = []
    for row in measured.rows:
        ratio = _ratio(row, own)
        lines.append([
            _name(row), name_of(TUNED[row.twin]), origin_name(row.origin),
            "" if row.us is None else f"{row.us:.2f}", f"{ratio:.2f}" if ratio else "",
            _words(row.knobs), row.wrong or "",
        ])  # fmt: skip
    columns = [
        Column("sizes", "text"), Column("on", "text"), Column("row from", "text"), Column("µs"), Column("÷ own"),
        Column("knobs", "code"), Column("failure", "text"),
    ]  # fmt: skip
    return Table(f"{op}, every row from elsewhere", columns, lines, (measured.source,), folded=True)


def with_table(text: str, transfer: Mapping[str, Measured]) -> str:
    """The page's text with the table put between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"tuning.md: expected {BEGIN.strip()} and {END}")
    return before + BEGIN + "\n".join(_markdown(transfer)) + "\n" + END + after


def _markdown(transfer: Mapping[str, Measured]) -> Iterator[str]:
    """Median and worst ratio of each origin, devices together; empty where an operator has no such row."""
    kinds = ("heuristic", "twin", "device", "vllm")
    yield "| operator | on | rows | the written rule | the other twin's row | other devices' rows | vLLM's own table |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for op, measured in transfer.items():
        own = _own(measured.rows)
        for twin in TWINS:
            cells = []
            for kind in kinds:
                rows = [row for row in measured.rows if (row.twin, row.origin.partition(":")[0]) == (twin, kind)]
                ratios = [ratio for row in rows if (ratio := _ratio(row, own))]
                said = [f"{statistics.median(ratios):.2f}, {max(ratios):.2f}"] if ratios else []
                failed = sum(not row.us for row in rows)
                cells.append(", ".join([*said, *([f"{failed} fail"] if failed else [])]))
            count = sum(row.twin == twin for row in own.values())
            if count:
                yield f"| `{op}` | {twin} | {count} | {' | '.join(cells)} |"


def _own(rows: Sequence[Row]) -> _Own:
    return {_place(row): row for row in rows if row.origin == "own"}


def _fastest(rows: Sequence[Row]) -> list[Row]:
    """Of each table, size and twin."""
    best: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if row.us and ((one := best.get(_place(row))) is None or row.us < (one.us or 0)):
            best[_place(row)] = row
    return list(best.values())


def _name(row: Row) -> str:
    return f"{' '.join(f'{key}={value}' for key, value in row.statics.items())}, {row.dtype}, {row.size}"


def _words(knobs: Knobs) -> str:
    return ", ".join(f"{name}={value}" for name, value in knobs.items())


def _place(row: Row) -> tuple[object, ...]:
    return *sorted(row.statics.items()), row.dtype, row.size, row.twin


def _ratio(row: Row, own: _Own) -> float | None:
    best = own.get(_place(row))
    return row.us / best.us if row.us and best is not None and best.us else None
