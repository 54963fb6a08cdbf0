"""Result files, to which several runs contribute: an operator's, start.json and host.json.

    {"op", "device", "runs": [{"versions", "date", "command", "note", "rows": [row, …]}, …]}

"note", where there is one, says under what circumstances: what else the machine did, say. A run takes the place of rows with
the same keys; what else earlier runs measured stays, under their own versions, date and command. A file may also hold one run
alone, its fields beside "op" and "device".
"""

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

HEAD = ("versions", "date", "command")
NOTE = "note"


def read(path: Path, device: str) -> list[dict[str, Any]]:
    """The runs, none where there is no file. ValueError where the file is none of these, or another device's."""
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected an object, got {type(data).__name__}")
    if (of := data.get("device", device)) != device:
        raise ValueError(f"{path}: expected results of {device}, got {of}")
    runs = data.get("runs", [data])
    for run in runs:
        if absent := [key for key in (*HEAD, "rows") if key not in run]:
            raise ValueError(f"{path}: expected the keys {', '.join(HEAD)}, rows, without {', '.join(absent)}")
    return [{key: run[key] for key in (*HEAD, NOTE, "rows") if key in run} for run in runs]


def write(
    path: Path,
    op: str,
    device: str,
    earlier: Sequence[Mapping[str, Any]],
    versions: Mapping[str, str],
    command: str,
    measured: Sequence[Any],
    keys: Sequence[str],
    note: str | None = None,
) -> None:
    """In one step, rows a line each: `measured` ones (dataclasses), and of `earlier` runs what was not measured again."""
    if not measured:
        return

    def key_of(row: Mapping[str, Any]) -> str:
        return json.dumps([row.get(key) for key in keys], sort_keys=True)

    rows = [rounded(asdict(row)) for row in measured]
    again = {key_of(row) for row in rows}
    runs = [{**run, "rows": [row for row in run["rows"] if key_of(row) not in again]} for run in earlier]
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    noted = {NOTE: note} if note else {}
    runs.append({"versions": dict(versions), "date": date, "command": command, **noted, "rows": rows})
    parts = []
    for run in (run for run in runs if run["rows"]):
        head = "".join(f"      {json.dumps(key)}: {json.dumps(run[key])},\n" for key in (*HEAD, NOTE) if key in run)
        body = ",\n".join(f"        {json.dumps(row, allow_nan=False)}" for row in run["rows"])
        parts.append(f'    {{\n{head}      "rows": [\n{body}\n      ]\n    }}')
    head = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in (("op", op), ("device", device)))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{\n" + head + '  "runs": [\n' + ",\n".join(parts) + "\n  ]\n}\n", "utf-8")
    os.replace(temporary, path)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
