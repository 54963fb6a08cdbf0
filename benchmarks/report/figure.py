"""One figure twice: an SVG whose colours are the page's own, so that it follows light and dark, and a PNG.

The figure is as small as a phone is wide; larger screens scale it up.
"""

import io
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from .blocks import Picture, Source

_SIZE = (4.4, 3.7)
_DPI = 200
_INK, _GRID = "#20242a", "#d5d9df"
# Markers differ as well as colours, for who cannot tell some of these apart.
_MARKS = {
    "triton": ("o", "#1769aa"),
    "mosaic_gpu": ("s", "#c4500a"),
    "xla": ("^", "#6b7280"),
    "peer:vllm": ("D", "#1b7a43"),
    "peer:mamba_ssm": ("v", "#7b45c4"),
    "peer:fla": ("P", "#8a6400"),
    "peer:fla_gluon": ("X", "#b5175f"),
    "peer:causal_conv1d": ("v", "#7b45c4"),
    "peer:flash_qla": ("h", "#0f766e"),
    "peer:flashinfer": ("<", "#9f1239"),
    "floor": ("", _INK),
}
# For peers without a colour of their own; a figure that needs more than these goes round.
_SPARE = ((">", "#3f6212"), ("*", "#4338ca"))
_SVG_COLORS = {
    color: f"var(--series-{name.removeprefix('peer:').replace('_', '-')})" for name, (_, color) in _MARKS.items()
}
_SVG_COLORS |= {color: f"var(--series-spare-{number})" for number, (_, color) in enumerate(_SPARE)}
_SVG_COLORS |= {_INK: "var(--ink)", _GRID: "var(--line)"}
# Every figure numbers its parts from 1, which may stand only once in a page.
_NUMBERED = re.compile(r' id="[A-Za-z0-9.]+_\d+"')
_TICK = 1024


class Line(NamedTuple):
    """`key`: the implementation's name in results, which gives it its colour."""

    key: str
    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    band: Sequence[tuple[float, float]] | None = None
    """The (lowest, highest) around each point."""


class Panel(NamedTuple):
    name: str
    title: str
    alt: str
    x: str
    y: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float]] = ()
    """Horizontal lines: label and height."""
    log_y: bool = False
    from_zero: bool = True


def draw(panel: Panel, sources: Sequence[Source]) -> Picture:
    import matplotlib

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": panel.name, "font.size": 9, "text.color": _INK}
    with matplotlib.rc_context(style):
        figure = _figure(panel)
        vector, raster = io.StringIO(), io.BytesIO()
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        # A set of colours is enough for lines, and takes a third of the room.
        figure.savefig(raster, format="png", dpi=_DPI, facecolor="#ffffff", metadata={"Software": None})
    return Picture(panel.name, panel.title, panel.alt, _inline(vector.getvalue()), raster.getvalue(), sources)


def _figure(panel: Panel):
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    spare = itertools.cycle(_SPARE)
    for order, line in enumerate(panel.lines):
        mark, color = _MARKS.get(line.key) or next(spare)
        x, y = zip(*sorted(line.points), strict=True)
        axes.plot(
            x, y, marker=mark, markersize=4.5, linewidth=1.5, linestyle="--" if line.dashed else "-", color=color,
            label=line.label, zorder=3 + len(panel.lines) - order,
        )  # fmt: skip
        if line.band:
            low, high = zip(*(band for _, band in sorted(zip(line.points, line.band, strict=True))), strict=True)
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    for label, level in panel.levels:
        axes.axhline(level, color=_INK, linewidth=1, linestyle=":", label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_label(value)))
    if panel.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif panel.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.tick_params(colors=_INK, labelcolor=_INK, which="both")
    axes.grid(color=_GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def size_label(value: float) -> str:
    """1024 as 1k, 1048576 as 1M: sizes are powers of two."""
    for unit, power in (("G", 3), ("M", 2), ("k", 1)):
        if value >= _TICK**power:
            return f"{value / _TICK**power:g}{unit}"
    return f"{value:g}"


def _inline(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = _NUMBERED.sub("", svg)
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false">', svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    for color, variable in _SVG_COLORS.items():
        svg = svg.replace(color, variable)
    return re.sub(r"\s*\n\s*", "\n", svg)
