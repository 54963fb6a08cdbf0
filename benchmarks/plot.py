"""`python -m benchmarks plot JSON`: GB/s over size as PNG, one a sweep and dtype. `report` makes the page.

Nothing is read but the result file, so a figure can be redrawn anywhere.
"""

import argparse
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import results
from .results import CEILING, Row

_COLORS = {
    "triton": "#1f77b4",
    "mosaic_gpu": "#e6701f",
    "xla": "#8a8f98",
    "peer:vllm": "#2a9d5c",
    "peer:mamba_ssm": "#9467bd",
    "peer:fla": "#b8860b",
    "peer:fla_gluon": "#c2185b",
    "peer:causal_conv1d": "#9467bd",
    "peer:bonsai": "#5d4037",
    "peer:maxtext": "#00838f",
}
_NAMES = {"triton": "triton_ssm", "mosaic_gpu": "pallas_ssm (Mosaic GPU)", "xla": "pallas_ssm (XLA)"}
_INK, _GRID = "#20242a", "#d5d9df"
_AXES = {"E": "E = batch × heads", "T": "T = tokens", "D": "D = channels", "B": "B = sequences"}
_POINT = re.compile(r"(?:(?P<line>[^:]+): )?(?P<axis>\w+)=(?P<size>\d+)")
"""The names of a sweep's cases; the models' cases are on no axis."""


class Point(NamedTuple):
    """A row of a sweep: which figure it is in, and where."""

    line: str
    axis: str
    dtype: str
    size: int
    row: Row

    @property
    def figure(self) -> tuple[str, str, str]:
        return self.line, self.axis, self.dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("json", type=Path, help="a file that `run` wrote")


def validate(arguments: argparse.Namespace) -> None:
    """ValueError or OSError for what argparse cannot see."""
    results.read(arguments.json)


def main(arguments: argparse.Namespace) -> int:
    for path in draw(arguments.json):
        print(path)
    return 0


def draw(path: Path) -> list[Path]:
    """Writes <name>.<dtype>[.<sweep>].png beside the result file; the paths written."""
    head, rows = results.read(path)
    written = []
    points = points_of(rows)
    for key in dict.fromkeys(point.figure for point in points):
        own = [point for point in points if point.figure == key]
        line, _, dtype = key
        image = path.with_name(".".join(filter(None, (path.stem, dtype, re.sub(r"\W+", "-", line), "png"))))
        figure(title_of(head, own[0]), own, copy_gbps(rows), image)
        written.append(image)
    return written


def points_of(rows: Sequence[Row]) -> list[Point]:
    matches = [(row, _POINT.fullmatch(row.case)) for row in rows]
    return [
        Point(match["line"] or "", match["axis"], dtype_of(row), int(match["size"]), row)
        for row, match in matches
        if match
    ]


def title_of(head: dict[str, Any], point: Point) -> str:
    dtype = f"{point.dtype} state" if "state_dtype" in point.row.dims else point.dtype
    return ", ".join(filter(None, (head["op"], point.line, dtype, head["device"].replace("_", " "))))


def figure(title: str, points: Sequence[Point], ceiling: float | None, path: Path) -> None:
    """One PNG."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    canvas = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = canvas.add_subplot()
    present = {point.row.implementation for point in points}
    for implementation in [*(name for name in _COLORS if name in present), *sorted(present - _COLORS.keys())]:
        own = sorted((point.size, point.row.gbps, point.row.source) for point in points
                     if point.row.implementation == implementation)  # fmt: skip
        x, y, sources = zip(*own, strict=True)
        is_quoted = "quoted" in sources
        axes.plot(
            x, y, marker="o", markersize=5, linewidth=1.8, linestyle="--" if is_quoted else "-",
            color=_COLORS.get(implementation), markerfacecolor="white" if is_quoted else None,
            label=name_of(implementation) + (" (quoted, L2 not flushed)" if is_quoted else ""),
        )  # fmt: skip
    if ceiling:
        axes.axhline(ceiling, color=_INK, linewidth=1, linestyle=":", label=f"copy ceiling, {ceiling:.0f} GB/s")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(_AXES.get(points[0].axis, points[0].axis), color=_INK)
    axes.set_ylabel("GB/s, cold L2", color=_INK)
    axes.set_title(textwrap.fill(title, 84), color=_INK, fontsize=11)
    axes.tick_params(colors=_INK)
    axes.grid(color=_GRID, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_color(_GRID)
    canvas.legend(frameon=False, labelcolor=_INK, fontsize=9, loc="outside lower center", ncols=4)
    canvas.savefig(path)


def copy_gbps(rows: Sequence[Row]) -> float | None:
    return max((row.gbps for row in rows if row.implementation == CEILING), default=None)


def dtype_of(row: Row) -> str:
    """What separates one figure from the next: the state's dtype where there is a state."""
    return str(row.dims.get("state_dtype", row.dims.get("dtype", "")))


def name_of(implementation: str) -> str:
    return _NAMES.get(implementation, implementation.removeprefix("peer:"))
