"""The committed results of one device: what is there, and what is not.

    <op>.json       `python -m benchmarks run <op>`; `results.py` has its schema
    start.json      `python -m benchmarks start`; rows {"op", "implementation" (or "package"), "phase", "seconds"}, with the
                    phases "import", "cold" (empty caches) and "warm" (caches filled), "compiles" where they were counted,
                    and "case"
    host.json       `python -m benchmarks host`; rows {"op", "implementation", "us"}: host time of one call, and "case" and
                    "replay_us": a replay of a CUDA graph of it
    transfer.json   `python -m benchmarks transfer <op>`; `benchmarks/transfer.py` has its schema
    tuning/         the logs of `python -m benchmarks tune`

start.json and host.json hold runs, each with versions, date and command; `benchmarks/runs.py` has their schema.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import results, runs
from ..ops import OPS, STAGES
from ..results import Row
from .blocks import Source

OPERATORS = (
    "selective_state_update",
    "causal_conv1d",
    "causal_conv1d_update",
    "mamba_chunk_scan_combined",
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
)
"""What a model calls. An operator's stages come after it, any other operator with a result file after these."""

_OTHERS = ("start", "host", "transfer")
_PHASES = ("import", "cold", "warm")


@dataclass(frozen=True)
class Measured:
    """One file, or one run of a file."""

    source: Source
    rows: Sequence[Any]


@dataclass(frozen=True)
class Results:
    device: str
    """In the words of the tables: NVIDIA_H200."""
    folder: Path
    ops: Mapping[str, Measured]
    """Rows are `results.Row`s."""
    start: Sequence[Measured]
    """By run."""
    host: Sequence[Measured]
    transfer: Mapping[str, Measured]
    """By operator."""

    @property
    def missing(self) -> list[tuple[str, str | None]]:
        """(file, the command that writes it, or None where there is none yet)"""
        found: list[tuple[str, str | None]] = [
            (f"{op}.json", f"python -m benchmarks run {op}" if op in OPS else None)
            for op in OPERATORS
            if op not in self.ops
        ]
        if not self.start:
            found.append(("start.json", "python -m benchmarks start"))
        if not self.host:
            found.append(("host.json", "python -m benchmarks host"))
        untransferred = [op for op in OPS if op in self.ops and op not in self.transfer and op not in STAGES]
        return found + [(f"transfer.json, {op}", f"python -m benchmarks transfer {op}") for op in untransferred]


def load(folder: Path) -> Results:
    """ValueError where a file is not what it must be, with its name; OSError where it cannot be read."""
    device = folder.name
    present = {path.stem: path for path in sorted(folder.glob("*.json")) if path.stem not in _OTHERS}
    known = [name for op in OPERATORS for name in (op, *(stage for stage, whole in STAGES.items() if whole == op))]
    order = [op for op in known if op in present] + [op for op in present if op not in known]
    if not order:
        raise ValueError(f"{folder}: expected result files of `python -m benchmarks run`, got none")
    return Results(
        device,
        folder,
        {op: _operator(present[op], device) for op in order},
        _rows(folder / "start.json", device, {"op": str, "phase": str, "seconds": float}),
        _rows(folder / "host.json", device, {"op": str, "us": float}),
        _transfer(folder / "transfer.json", device),
    )


def _operator(path: Path, device: str) -> Measured:
    try:
        head, rows = results.read(path)
        source = Source.of(path, head, device)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no result file of `run`: {error!r}") from error
    return Measured(source, rows)


def _rows(path: Path, device: str, fields: Mapping[str, type]) -> list[Measured]:
    return [
        Measured(Source.of(path, run, device), [_row(path, row, fields) for row in run["rows"]])
        for run in runs.read(path, device)
    ]


def _row(path: Path, row: Mapping[str, Any], fields: Mapping[str, type]) -> Mapping[str, Any]:
    row = {"implementation": row.get("package"), **row}
    for key, kind in {**fields, "implementation": str}.items():
        value = row.get(key)
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise ValueError(f"{path}: {key}: expected {kind.__name__}, got {value!r} in {row}")
    if "phase" in fields and row["phase"] not in _PHASES:
        raise ValueError(f"{path}: phase: expected one of {_PHASES}, got {row['phase']!r}")
    return row


def _transfer(path: Path, device: str) -> dict[str, Measured]:
    from .. import transfer

    if not path.exists():
        return {}
    found = transfer.read(path)
    return {op: Measured(Source.of(path, head, device), rows) for op, (head, rows) in found.items()}


def implementations(rows: Sequence[Row]) -> list[str]:
    """In the order of the file, without the ceiling."""
    return [name for name in dict.fromkeys(row.implementation for row in rows) if name != results.CEILING]
