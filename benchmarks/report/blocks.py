"""What the page is made of: sections of paragraphs, figures and tables, each figure and table with its source."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Source:
    """Where figures come from: a file, and how and on what it was measured."""

    file: str
    """Its name, as a reader finds it below `benchmarks/results/<device>` (or in the repository)."""
    device: str
    command: str
    date: str
    versions: str
    note: str = ""
    """Under what circumstances."""

    @property
    def is_table(self) -> bool:
        return self.file.startswith("configs/")

    @staticmethod
    def of(path: Path, head: dict[str, Any], device: str) -> "Source":
        """`head`: what stands in a result file besides its rows."""
        versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
        return Source(
            path.name, device.replace("_", " "), head["command"], head["date"], versions, head.get("note", "")
        )


Kind = Literal["text", "number", "code"]


@dataclass(frozen=True)
class Column:
    title: str
    kind: Kind = "number"


@dataclass(frozen=True)
class Table:
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    """Cells in words; the first of a row names it."""
    sources: Sequence[Source]
    folded: bool = False
    """Shown when it is asked for: long ones."""


@dataclass(frozen=True)
class Picture:
    name: str
    """Of its PNG."""
    title: str
    alt: str
    """What it shows, for who cannot see it; the numbers are in the table below it."""
    svg: str
    png: bytes
    sources: Sequence[Source]


@dataclass
class Section:
    anchor: str
    title: str
    paragraphs: list[str] = field(default_factory=list)
    blocks: list[Picture | Table | list[Picture]] = field(default_factory=list)
    """A list of pictures stands side by side where there is room."""

    @property
    def pictures(self) -> list[Picture]:
        found = []
        for block in self.blocks:
            found += block if isinstance(block, list) else [block] if isinstance(block, Picture) else []
        return found

    @property
    def sources(self) -> list[Source]:
        tables = [block for block in self.blocks if isinstance(block, Table)]
        return list(dict.fromkeys(source for one in (*self.pictures, *tables) for source in one.sources))


def merged(anchor: str, title: str, sections: Sequence[Section]) -> Section:
    """One section of several, whose paragraphs say which they are from."""
    said = [f"{section.title}: {paragraph}" for section in sections for paragraph in section.paragraphs]
    return Section(anchor, title, said, list(itertools.chain(*(section.blocks for section in sections))))
