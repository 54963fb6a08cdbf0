"""An operator's speed: time and bandwidth over size, the models' shapes, and how exact the results were."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import replace

from parity_tests.operators import OPERATORS
from parity_tests.tolerances import TOLERANCES

from ..op import BenchOp
from ..ops import OPS
from ..plot import Point, copy_gbps, dtype_of, name_of, points_of, title_of
from ..results import CEILING, Row
from .blocks import Column, Picture, Section, Source, Table
from .figure import Line, Panel, draw
from .sources import Measured, implementations

_AXES = {
    "E": "E = batch × heads", "T": "T, tokens", "D": "D, channels", "B": "B, sequences", "H": "H, heads",
}  # fmt: skip
_FLOOR = "copy of the same bytes"


def section(op: str, measured: Measured, declared: BenchOp | None) -> Section:
    rows, sources = measured.rows, (measured.source,)
    ceiling = copy_gbps(rows)
    made = Section(f"speed-{op}", op, [_sentence(rows, ceiling, declared)])
    drawn = declared is None or declared.drawn
    points = points_of(rows) if drawn else []
    for key in dict.fromkeys(point.figure for point in points):
        own = [point for point in points if point.figure == key]
        made.blocks += [_pictures(op, own, ceiling, sources), _table(op, own, sources)]
    if models := [row for row in rows if row.implementation != CEILING and row not in [point.row for point in points]]:
        made.blocks.append(_models(op, models, sources))
    made.blocks += [replace(_errors(op, rows, sources), folded=not drawn), _details(op, rows, sources)]
    return made


def peer_ratios(rows: Sequence[Row], implementation: str) -> list[float]:
    """For every shape the fastest peer's time over `implementation`'s."""
    return [
        min(peers) / own
        for of_shape in by_shape(rows).values()
        if (own := of_shape.get(implementation))
        and (peers := [us for name, us in of_shape.items() if name.startswith("peer:")])
    ]


def twin_ratios(rows: Sequence[Row]) -> list[float]:
    """For every shape Pallas' time over Triton's."""
    return [
        of_shape["mosaic_gpu"] / of_shape["triton"]
        for of_shape in by_shape(rows).values()
        if {"mosaic_gpu", "triton"} <= of_shape.keys()
    ]


def floor_shares(rows: Sequence[Row], implementation: str) -> list[float]:
    """For every shape the copy's time over `implementation`'s."""
    return [row.floor_us / row.us for row in rows if row.implementation == implementation and row.floor_us]


def by_shape(rows: Sequence[Row]) -> dict[tuple[object, ...], dict[str, float]]:
    """Microseconds by implementation, for every shape that was measured here."""
    shapes: dict[tuple[object, ...], dict[str, float]] = {}
    for row in rows:
        if row.implementation != CEILING and row.source == "measured":
            shapes.setdefault((row.case, *row.dims.items()), {})[row.implementation] = row.us
    return shapes


def _sentence(rows: Sequence[Row], ceiling: float | None, declared: BenchOp | None) -> str:
    said = [f"{len(by_shape(rows))} shapes: device time of one call, cold L2, median."]
    if ceiling:
        said.append(f"The ceiling is a copy in the same run: {ceiling:.0f} GB/s, read and written.")
    if declared:
        names = (*declared.own, *(peer.implementation for peer in declared.peers))
        if absent := [name_of(name) for name in names if name not in implementations(rows)]:
            said.append(f"Not in this run: {', '.join(absent)}.")
    return " ".join(said)


def _pictures(op: str, points: Sequence[Point], ceiling: float | None, sources: Sequence[Source]) -> list[Picture]:
    first = points[0]
    what = _what(op, first)
    name = re.sub(r"[^\w.]+", "-", "-".join(filter(None, (op, first.dtype, first.line)))).lower()

    def lines(value) -> list[Line]:
        return [
            Line(
                key,
                name_of(key) + (" (quoted)" if own[0].row.source == "quoted" else ""),
                [(point.size, value(point.row)) for point in own],
                dashed=own[0].row.source == "quoted",
            )
            for key in implementations([point.row for point in points])
            if (own := [point for point in points if point.row.implementation == key])
        ]

    floor = sorted({(point.size, point.row.floor_us) for point in points if point.row.floor_us})
    axis = _AXES.get(first.axis, first.axis)
    time = Panel(
        f"{name}-time", f"{what}: time", f"Time of one call over {axis}. {_spoken(points)}", axis, "µs, cold L2",
        [*lines(lambda row: row.us), *([Line("floor", _FLOOR, floor, dashed=True)] if floor else [])],
        log_y=True,
    )  # fmt: skip
    rate = Panel(
        f"{name}-rate", f"{what}: bandwidth", f"Least bytes over time, over {axis}. {_spoken(points)}", axis, "GB/s, cold L2",
        lines(lambda row: row.gbps), [(f"copy, {ceiling:.0f} GB/s", ceiling)] if ceiling else [],
    )  # fmt: skip
    return [draw(time, sources), draw(rate, sources)]


def _what(op: str, point: Point) -> str:
    """The sweep in words."""
    return title_of({"op": op, "device": ""}, point)


def _spoken(points: Sequence[Point]) -> str:
    """The largest size in words."""
    last = max(point.size for point in points)
    said = [f"{name_of(point.row.implementation)} {point.row.us:.1f}" for point in points if point.size == last]
    return f"At {points[0].axis} = {last}, in microseconds: {', '.join(said)}."


def _table(op: str, points: Sequence[Point], sources: Sequence[Source]) -> Table:
    first = points[0]
    names = implementations([point.row for point in points])
    lines = []
    for size in sorted({point.size for point in points}):
        rows = {point.row.implementation: point.row for point in points if point.size == size}
        floor = next(iter(rows.values())).floor_us
        lines.append([str(size), *_cells(rows, names, floor)])
    caption = f"{_what(op, first)}, µs (and share of the copy's speed)"
    return Table(caption, [Column(first.axis, "text"), *_columns(names)], lines, sources)


def _models(op: str, rows: Sequence[Row], sources: Sequence[Source]) -> Table:
    names = implementations(rows)
    lines = []
    for case, dtype in dict.fromkeys((row.case, dtype_of(row)) for row in rows):
        own = {row.implementation: row for row in rows if (row.case, dtype_of(row)) == (case, dtype)}
        one = next(iter(own.values()))
        shape = " ".join(f"{key}={value}" for key, value in one.dims.items() if "dtype" not in key)
        lines.append([f"{case}, {dtype}", *_cells(own, names, one.floor_us), shape])
    columns = [Column("model", "text"), *_columns(names), Column("shape", "text")]
    return Table(f"{op}, models' shapes, µs (and share of the copy's speed)", columns, lines, sources)


def _columns(names: Sequence[str]) -> list[Column]:
    return [*(Column(name_of(name)) for name in names), Column(_FLOOR)]


def _cells(rows: dict[str, Row], names: Sequence[str], floor: float | None) -> list[str]:
    cells = [_cell(rows.get(name)) for name in names]
    return [*cells, f"{floor:.1f}" if floor else ""]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.us:.1f} ({row.floor_us / row.us:.0%})" if row.floor_us else f"{row.us:.1f}"


def _errors(op: str, rows: Sequence[Row], sources: Sequence[Source]) -> Table:
    """The largest of each implementation and dtype, beside what is allowed."""
    lines = []
    measured = [row for row in rows if row.error is not None]
    for name in implementations(measured):
        for dtype in dict.fromkeys(dtype_of(row) for row in measured if row.implementation == name):
            own = [row for row in measured if (row.implementation, dtype_of(row)) == (name, dtype)]
            worst = max(own, key=lambda row: row.error or 0.0)
            limit = _limit(op, name, (str(worst.dims.get("dtype")), dtype))
            lines.append([
                name_of(name), dtype, f"{worst.error:.1e}", f"{statistics.median(row.error or 0.0 for row in own):.1e}",
                f"{limit:.1e}" if limit else "", worst.case,
            ])  # fmt: skip
    columns = [
        Column("implementation", "text"), Column("dtype", "text"), Column("largest"), Column("median"), Column("tolerance"),
        Column("largest at", "text"),
    ]  # fmt: skip
    caption = f"{op}, relative error of y and states against float64, checked before timing"
    return Table(caption, columns, lines, sources)


def _limit(op: str, implementation: str, dtypes: Sequence[str]) -> float | None:
    """What the gate allowed."""
    name = next((name for name, operator in OPERATORS.items() if operator.table == op), op)
    peers = OPS[op].peers if op in OPS else ()
    slack = next((peer.slack for peer in peers if peer.implementation == implementation), 1.0)
    limits = [slack * TOLERANCES[name, dtype].relative for dtype in dtypes if (name, dtype) in TOLERANCES]
    return max(limits, default=None)


def _details(op: str, rows: Sequence[Row], sources: Sequence[Source]) -> Table:
    lines = []
    for row in rows:
        spread = f"{row.us_p20:.2f}–{row.us_p80:.2f}" if row.us_p20 is not None else ""
        config = ", ".join(f"{key}={value}" for key, value in (row.config or {}).items() if value is not None)
        lines.append([
            row.case, dtype_of(row), name_of(row.implementation), f"{row.us:.2f}", spread,
            f"{row.bytes / 1e6:.2f}", f"{row.gbps:.0f}", "" if row.host_us is None else f"{row.host_us:.1f}",
            "" if row.kernels is None else str(len(row.kernels)), config, row.source,
        ])  # fmt: skip
    columns = [
        Column("case", "text"), Column("dtype", "text"), Column("implementation", "text"), Column("µs"),
        Column("p20–p80"), Column("MB"), Column("GB/s"), Column("host µs"), Column("kernels"), Column("launched with", "code"),
        Column("source", "text"),
    ]  # fmt: skip
    return Table(f"{op}, every row", columns, lines, sources, folded=True)
