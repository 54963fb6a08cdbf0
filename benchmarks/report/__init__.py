"""`python -m benchmarks report`: one self-contained page, and its figures as PNGs, from the committed results alone."""

import argparse
from pathlib import Path

from . import page, sources

_RESULTS = Path(__file__).parents[1] / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--device", default="NVIDIA_H200", help="a folder of results (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="where the folders are (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html among the results)")


def validate(arguments: argparse.Namespace) -> None:
    """ValueError or OSError for what argparse cannot see."""
    folder = arguments.results / arguments.device
    if not folder.is_dir():
        present = sorted(path.name for path in arguments.results.iterdir() if path.is_dir())
        raise ValueError(f"--device: expected one of {', '.join(present)}, got {arguments.device}")
    sources.load(folder)


def main(arguments: argparse.Namespace) -> int:
    folder = arguments.results / arguments.device
    page_file, *pictures = write(sources.load(folder), arguments.out or folder / "report.html")
    print(f"{page_file}, and {len(pictures)} figures in {page_file.with_suffix('')}")
    return 0


def write(results: sources.Results, out: Path) -> list[Path]:
    """The page at `out`, its figures in a folder of that name beside it; the paths written."""
    sections = page.sections(results)
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    written = [out]
    for picture in (picture for section in sections for picture in section.pictures):
        path = folder / f"{picture.name}.png"
        path.write_bytes(picture.png)
        written.append(path)
    out.write_text(page.render(results, sections), "utf-8")
    return written
