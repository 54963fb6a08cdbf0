"""Reading and writing one tuning table.

A table is a JSON object. Keys of plain digits hold launch configs, every other key is metadata. A config holds exactly
the operator's shared knobs, and optionally "triton" and "pallas" objects with that twin's knobs and "tuned_at" with the
dims it was measured at. vLLM's loader reads the same files: it takes the shared knobs and ignores the rest.

Nothing is guessed: whatever is not such a table raises `TableError`.
"""

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .spec import TWINS, Knobs, OpSpec, Statics, check_knobs


class TableError(ValueError):
    """A tuning table, or the folder it should be in, is not what it must be. Names file, key and reason."""

    def __init__(self, path: str | os.PathLike, reason: str, key: str | None = None):
        self.path, self.key, self.reason = str(path), key, reason
        super().__init__(f"{path}: {reason}" if key is None else f"{path}: key {key!r}: {reason}")

    def __reduce__(self):
        return type(self), (self.path, self.reason, self.key)


@dataclass(frozen=True)
class Entry:
    """One launch config of a table."""

    size: int
    shared: Knobs
    own: Mapping[str, Knobs]
    """Per twin that has an object of its own, its knobs."""
    tuned_at: Mapping[str, int] | None


@dataclass(frozen=True)
class Table:
    """A validated table: entries by ascending size, and the metadata as it stands in the file."""

    path: str
    entries: tuple[Entry, ...]
    metadata: Mapping[str, Any]

    def nearest(self, size: int) -> Entry:
        """The entry whose size is nearest by absolute distance, ties to the lower."""
        return min(self.entries, key=lambda entry: (abs(entry.size - size), entry.size))


def read_table(path: str | os.PathLike, spec: OpSpec, statics: Statics) -> Table:
    """Read and validate one file. Raises `TableError`, also where the file cannot be read."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise TableError(path, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TableError(path, f"is not UTF-8: {error}") from error
    return _parse(text, path, spec, statics)


def write_table(path: str | os.PathLike, table: Mapping[str, Any], spec: OpSpec, statics: Statics) -> None:
    """Validate `table` and put it at `path` in one step: a reader sees the old file or the new one, nothing between.

    Metadata comes first, then the configs by ascending size, one a line.
    """
    path = Path(path)
    if not all(isinstance(key, str) for key in table):
        raise TableError(path, f"expected keys of type str, got {tuple(table)}")
    try:
        # Stable, so metadata keeps its order.
        ordered = sorted(table.items(), key=lambda item: int(item[0]) if item[0].isdecimal() else 0)
        lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in ordered]
    except (TypeError, ValueError) as error:
        raise TableError(path, f"cannot be written as JSON: {error}") from error
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    _parse(text, path, spec, statics)

    # Beside the target, because os.replace is atomic only within one file system.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _parse(text: str, path: str | os.PathLike, spec: OpSpec, statics: Statics) -> Table:
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError as error:
        raise TableError(path, "is nested too deeply") from error
    except ValueError as error:
        raise TableError(path, f"is not a table: {error}" if text.strip() else "is empty") from error
    if not isinstance(data, dict):
        raise TableError(path, f"expected a JSON object, got {_kind(data)}")

    entries, metadata = [], {}
    for key, value in data.items():
        try:
            size = _size_key(key)
            if size is None:
                metadata[key] = value
            else:
                entries.append(_entry(size, value, spec, statics))
        except (TypeError, ValueError) as error:
            raise TableError(path, str(error), key) from error
    if not entries:
        raise TableError(path, "holds no config, expected at least one key of digits")
    entries.sort(key=lambda entry: entry.size)
    return Table(str(path), tuple(entries), metadata)


def _size_key(key: str) -> int | None:
    """The size a key stands for, or None where it is metadata."""
    try:
        size = int(key)
    except ValueError:
        if key.isdigit():  # superscripts, and more digits than int() takes
            raise
        return None
    # int() also reads "007", " 8", "+8", "1_024" and other scripts' digits: each a slip, or a second name of one size.
    if key != str(size) or size < 1:
        raise ValueError("expected a positive size in plain digits without leading zeros")
    return size


def _entry(size: int, value: object, spec: OpSpec, statics: Statics) -> Entry:
    fields = _object("the config", value)
    own = {twin: _own_knobs(twin, fields.pop(twin), spec, statics) for twin in TWINS if twin in fields}
    tuned_at = _tuned_at(fields.pop("tuned_at"), spec) if "tuned_at" in fields else None
    check_knobs(spec.knobs, fields, statics)
    return Entry(size, fields, own, tuned_at)


def _own_knobs(twin: str, value: object, spec: OpSpec, statics: Statics) -> Knobs:
    knobs = _object(f'"{twin}"', value)
    try:
        check_knobs(spec.knobs_of(twin), knobs, statics)
    except (TypeError, ValueError) as error:
        raise ValueError(f'"{twin}": {error}') from error
    return knobs


def _tuned_at(value: object, spec: OpSpec) -> dict[str, int]:
    dims = _object('"tuned_at"', value)
    if dims.keys() != set(spec.tuned_at) or not all(type(dim) is int and dim > 0 for dim in dims.values()):
        raise ValueError(f'"tuned_at": expected positive ints for exactly {", ".join(spec.tuned_at)}, got {dims}')
    return dims


def _object(what: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise TypeError(f"{what}: expected an object, got {_kind(value)}")
    return dict(value)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps the last of equal keys without a word; in a hand-edited table that hides a config.
    result = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} stands twice in one object")
        result[key] = value
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
