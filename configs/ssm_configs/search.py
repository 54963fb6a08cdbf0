"""Finding the table row for a launch: folders in order, then the written heuristic.

1. `SSM_TUNED_CONFIG_FOLDER/<op>/<file>`; the folder must exist.
2. `VLLM_TUNED_CONFIG_FOLDER/<file>`, for operators whose tables are vLLM's; a folder that does not exist only warns,
   because the variable is not ours.
3. The shipped tables.
4. The operator's heuristic, with a warning.

In each folder the device's own name comes before its alias. The first file that exists decides; if it is malformed,
that is an error and not a reason to look further.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from .devices import Device, alias
from .names import file_name, parse_table_file_name
from .spec import Knobs, OpSpec, Statics
from .specs import get_spec
from .table import Table, TableError, read_table

SSM_FOLDER = "SSM_TUNED_CONFIG_FOLDER"
VLLM_FOLDER = "VLLM_TUNED_CONFIG_FOLDER"
SHIPPED = Path(__file__).parent / "tables"


class Step(NamedTuple):
    """One rule that a look-up tried, and what came of it."""

    rule: str
    outcome: str


@dataclass(frozen=True)
class Row:
    """What the search found."""

    source: str
    shared: Knobs
    own: Mapping[str, Knobs]
    path: str | None = None
    key: int | None = None
    steps: tuple[Step, ...] = ()
    warnings: tuple[str, ...] = ()


def find_row(
    spec: OpSpec, device: Device, table_dtype: str, size: int, statics: Statics, folders: tuple[str | None, str | None]
) -> Row:
    """The row for one launch, with every rule tried on the way. Raises `TableError`; reports warnings, gives none.

    `folders` holds the values of `SSM_TUNED_CONFIG_FOLDER` and `VLLM_TUNED_CONFIG_FOLDER`.
    """
    names = [file_name(spec, device.table_name, table_dtype, statics)]
    if other := alias(device.table_name):
        names.append(file_name(spec, other, table_dtype, statics))
    steps: list[Step] = []
    warnings: list[str] = []

    for source, folder in _places(spec, folders, steps, warnings):
        for path in (os.path.join(folder, name) for name in names):
            # lexists: a dangling link is a broken table, not a missing one.
            if os.path.lexists(path):
                entry = _table(path, spec.name, tuple(statics.items())).nearest(size)
                steps.append(Step(source, f"{path}, key {entry.size} (nearest to {size})"))
                return Row(source, entry.shared, entry.own, path, entry.size, tuple(steps), tuple(warnings))
        steps.append(Step(source, f"no {' nor '.join(names)} in {folder}"))

    warnings.append(
        f"{spec.name}: no tuning table {' nor '.join(names)}; launching with the written heuristic. "
        f"ssm_configs.explain({spec.name!r}, ...) shows where it was looked for."
    )
    steps.append(Step("heuristic", "no table for this device, sizes and dtype"))
    shared = spec.heuristic(statics, table_dtype, device, size)
    return Row("heuristic", shared, {}, steps=tuple(steps), warnings=tuple(warnings))


def _places(
    spec: OpSpec, folders: tuple[str | None, str | None], steps: list[Step], warnings: list[str]
) -> Iterator[tuple[str, str]]:
    ssm, vllm = folders
    if not ssm:
        steps.append(Step(SSM_FOLDER, "not set"))
    elif not os.path.isdir(ssm):
        raise TableError(ssm, f"{SSM_FOLDER} names a folder that does not exist")
    else:
        yield SSM_FOLDER, os.path.join(ssm, spec.name)

    if not spec.vllm_compatible:
        steps.append(Step(VLLM_FOLDER, "vLLM has no tables for this operator"))
    elif not vllm:
        steps.append(Step(VLLM_FOLDER, "not set"))
    elif not os.path.isdir(vllm):
        steps.append(Step(VLLM_FOLDER, f"{vllm} does not exist"))
        warnings.append(f"{VLLM_FOLDER}={vllm} is not a folder; looking further without it")
    else:
        yield VLLM_FOLDER, vllm

    yield "shipped", str(SHIPPED / spec.name)


@lru_cache(maxsize=256)
def _table(path: str, op: str, statics: tuple[tuple[str, int], ...]) -> Table:
    return read_table(path, get_spec(op), dict(statics))


def forget_tables() -> None:
    """Read every file again when it is next asked for."""
    _table.cache_clear()


class ShippedTable(NamedTuple):
    """One table that comes with the package."""

    path: Path
    statics: dict[str, int]
    device_name: str
    dtype: str


def shipped_tables(op: str) -> Iterator[ShippedTable]:
    """The shipped tables of `op` by file name; read one with `read_table(table.path, SPECS[op], table.statics)`."""
    for path in sorted((SHIPPED / get_spec(op).name).glob("*.json")):
        yield ShippedTable(path, *parse_table_file_name(op, path.name))
