"""The sections in their order, what stands before them, and the page around them."""

import statistics
from collections.abc import Callable
from pathlib import Path

from ..ops import OPS, STAGES
from . import speed, start, transferred, tuned
from .blocks import Column, Section, Table, merged
from .sources import Results

_COLUMNS = (
    Column("operator", "text"), Column("shapes"), Column("of the copy's speed, Triton"), Column("Pallas"),
    Column("Pallas ÷ Triton"), Column("fastest peer ÷ Triton"), Column("fastest peer ÷ Pallas"),
)  # fmt: skip


def sections(results: Results) -> list[Section]:
    made = [_summary(results)]
    made += _grouped(results, lambda op: speed.section(op, results.ops[op], OPS.get(op)), "speed", "")
    made += start.sections(results)
    made += _grouped(
        results, lambda op: tuned.section(op, results.device, results.folder / "tuning"), "tuned", ": tuned rows"
    )
    made += [transferred.section(op, measured) for op, measured in results.transfer.items()]
    return made


def _grouped(results: Results, section: Callable[[str], Section | None], what: str, title: str) -> list[Section]:
    """A section for every operator, and one for all stages of one."""
    made: dict[str, list[Section]] = {}
    for op in results.ops:
        if one := section(op):
            made.setdefault(STAGES.get(op, ""), []).append(one)
    whole = made.pop("", [])
    for name, of_stages in made.items():
        anchors = [one.anchor for one in whole]
        at = anchors.index(f"{what}-{name}") + 1 if f"{what}-{name}" in anchors else len(whole)
        whole.insert(at, merged(f"{what}-{name}-stages", f"{name}, its stages{title}", of_stages))
    return whole


def render(results: Results, made: list[Section]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    every = list(dict.fromkeys(source for section in made for source in section.sources))
    return environment.get_template("page.html").render(
        device=results.device.replace("_", " "), sections=made, sources=every, missing=results.missing
    )


def _summary(results: Results) -> Section:
    """A line an operator, over all its shapes: medians."""
    lines, used = [], []
    for op, measured in results.ops.items():
        rows = measured.rows
        used.append(measured.source)
        lines.append([
            op, str(len(speed.by_shape(rows))),
            *(_median(speed.floor_shares(rows, name), "{:.0%}") for name in ("triton", "mosaic_gpu")),
            _median(speed.twin_ratios(rows), "{:.2f}"),
            *(_median(speed.peer_ratios(rows, name), "{:.2f}") for name in ("triton", "mosaic_gpu")),
        ])  # fmt: skip
    said = (
        "Medians over all shapes. Above 1, a peer takes longer. The copy moves an operator's least bytes at the rate of the "
        "fastest copy of the same run, which small shapes cannot reach: a launch takes its time whatever it moves."
    )
    return Section(
        "summary", "At a glance", [said], [Table("Every operator, all shapes", _COLUMNS, lines, tuple(used))]
    )


def _median(values: list[float], text: str) -> str:
    return text.format(statistics.median(values)) if values else ""
