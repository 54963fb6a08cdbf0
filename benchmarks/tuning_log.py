"""The tuner's memory: every measurement and verdict, appended at once, so that a restart goes on where a crash stopped."""

import json
from pathlib import Path
from typing import Any

from ssm_configs.spec import Knobs

Config = tuple[tuple[str, Any], ...]
# One start without a verdict may be an interrupted run; two, and the config takes the process down with it.
_MAX_UNFINISHED = 2


def config_of(knobs: Knobs) -> Config:
    """Knobs as a key: sorted, hashable."""
    return tuple(sorted(knobs.items()))


class TuningLog:
    """One table, one twin: a JSONL file. Lines of another `identity` (device, versions, kernel source) do not count."""

    def __init__(self, path: Path, identity: dict[str, str]):
        self.path, self.identity = path, identity
        self.times: dict[int, dict[Config, float]] = {}
        self.verdicts: dict[tuple[int, Config], str | None] = {}
        """What is wrong with a config at a size, or None where it passed."""
        self._starts: dict[tuple[int, Config], int] = {}
        for record in self._read():
            if record.get("identity") == identity:
                self._apply(record)

    def add_time(self, size: int, knobs: Knobs, **record: Any) -> None:
        """`record` holds "us" at least."""
        self._append({"kind": "time", "size": size, "knobs": knobs, **record})

    def start_check(self, size: int, knobs: Knobs) -> None:
        self._append({"kind": "start", "size": size, "knobs": knobs})

    def add_verdict(self, size: int, knobs: Knobs, wrong: str | None, **record: Any) -> None:
        self._append({"kind": "verdict", "size": size, "knobs": knobs, "wrong": wrong, **record})

    def verdict(self, size: int, knobs: Knobs) -> str | None:
        """What is wrong with a checked config, or None. KeyError where it has not been checked."""
        key = size, config_of(knobs)
        if key not in self.verdicts and self._starts.get(key, 0) >= _MAX_UNFINISHED:
            return f"{self._starts[key]} checks were started and none came to an end"
        return self.verdicts[key]

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue  # the line that a crash cut short
        return records

    def _append(self, record: dict[str, Any]) -> None:
        self._apply(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record | {"identity": self.identity})
        with self.path.open("a+", encoding="utf-8") as file:
            # A line that a crash cut short must not swallow this one.
            file.seek(0, 2)
            if file.tell() and not self._ends_with_newline():
                text = "\n" + text
            file.write(text + "\n")

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"

    def _apply(self, record: dict[str, Any]) -> None:
        size, config = record["size"], config_of(record["knobs"])
        if record["kind"] == "time":
            self.times.setdefault(size, {})[config] = record["us"]
        elif record["kind"] == "start":
            self._starts[size, config] = self._starts.get((size, config), 0) + 1
        else:
            self.verdicts[size, config] = record["wrong"]
