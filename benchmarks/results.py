"""The result file: one JSON a device and op (`runs`), the only source of every figure that is shown."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity_tests.cases import Case

from . import runs
from .op import BenchOp

CEILING = "ceiling:copy"


@dataclass(kw_only=True)
class Row:
    """One implementation at one shape. None: not measured, or without meaning here."""

    case: str
    dims: Mapping[str, int | str]
    implementation: str
    us: float
    us_p20: float | None = None
    us_p80: float | None = None
    host_us: float | None = None
    bytes: int
    flops: int | None = None
    floor_us: float | None = None
    error: float | None = None
    """The largest relative error of y and the states against float64."""
    config: Mapping[str, Any] | None = None
    """Launch knobs, and where they come from."""
    kernels: Sequence[str] | None = None
    """What ran on the device for one call."""
    source: str = "measured"
    """"measured" here and now, or "quoted" from a file of figures measured elsewhere."""

    @property
    def gbps(self) -> float:
        return self.bytes / self.us / 1e3


def dims_of(op: BenchOp, case: Case) -> dict[str, int | str]:
    dims: dict[str, int | str] = {**case.dims, "dtype": case.dtype}
    if "lengths" in case.options:
        dims["n_seq"] = len(case.options["lengths"])
    if op.dtype_field == "state_dtype":
        dims["state_dtype"] = case.state_dtype
    return dims


def set_floors(rows: Iterable[Row]) -> None:
    """Floor = least traffic at the rate of the fastest copy measured in the same run."""
    rows = list(rows)
    rates = [row.bytes / row.us for row in rows if row.implementation == CEILING]
    for row in rows:
        if rates and row.implementation != CEILING:
            row.floor_us = row.bytes / max(rates)


def quoted(op: BenchOp, cases: Sequence[Case], path: Path, names: Sequence[str]) -> list[Row]:
    """Rows for the peers `names` from a JSONL of figures: op, peer, dims, dtype (that sweeps go by) and graph_ms a line.

    `graph_ms` is kernel time like ours; unlike ours it is taken without flushing L2. Dims that a line leaves out are those
    of `op.quoted_statics`.
    """
    if op.quoted_as is None:
        return []
    figures = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = []
    for case in (case for case in cases if op.table_key(case)[1] == dict(op.quoted_statics)):
        for figure in figures:
            same = all(case.dims[key] == figure[key] for key in case.dims.keys() & figure.keys())
            same_dtype = figure.get("dtype", "").removeprefix("torch.") == op.dtype_of(case)
            if figure.get("op") != op.quoted_as or not (same and same_dtype) or figure.get("peer") not in names:
                continue
            rows.append(
                Row(
                    case=case.name,
                    dims=dims_of(op, case),
                    implementation=f"peer:{figure['peer']}",
                    us=figure["graph_ms"] * 1e3,
                    bytes=op.bytes_moved(case),
                    flops=op.flops(case),
                    config={"quoted from": path.name, "timing": "CUDA graph replay, L2 not flushed"},
                    source="quoted",
                )
            )
    return rows


def write(path: Path, op: str, device: str, versions: Mapping[str, str], command: str, rows: Sequence[Row]) -> None:
    """In one step. What earlier runs measured and this one did not stays."""
    runs.write(path, op, device, runs.read(path, device), versions, command, rows, ("case", "implementation", "dims"))


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """(op and device, with all runs' versions, dates and commands; the rows of all runs)."""
    data = json.loads(path.read_text(encoding="utf-8"))
    found = data.get("runs", [data])
    head = {"op": data["op"], "device": data["device"], "versions": {}}
    for run in found:
        head["versions"] |= run["versions"]
    for name in ("date", "command"):
        head[name] = "; ".join(dict.fromkeys(run[name] for run in found))
    return head, [Row(**row) for run in found for row in run["rows"]]
