"""Device names as tuning tables spell them, the aliases among them, and what to compile for."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """The device a launch is for: its name as the driver gives it, and its CUDA capability where it has one."""

    name: str
    capability: tuple[int, int] | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"Device.name: expected a non-empty str, got {self.name!r}")
        capability = self.capability
        if capability is not None and not (
            isinstance(capability, tuple) and len(capability) == 2 and all(type(part) is int for part in capability)
        ):
            raise TypeError(f"Device.capability: expected (major, minor) or None, got {capability!r}")

    @property
    def table_name(self) -> str:
        """The name in table files, by vLLM's rule: every run of whitespace or "/" becomes one "_"."""
        return re.sub(r"[\s/]+", "_", self.name)


def alias(table_name: str) -> str | None:
    """The device whose tables serve `table_name` where it has none of its own (devices.json says why)."""
    entry = _data()["aliases"].get(table_name)
    return entry["table"] if entry else None


def architecture(table_name: str) -> str | None:
    """The target to compile a device's table rows for ("sm_90", "gfx942", ...), or None where they are only loaded.

    An alias has the target of the device it stands for.
    """
    architectures = _data()["architectures"]
    name = alias(table_name) or table_name
    if name not in architectures:
        raise ValueError(f"table_name: got {table_name!r}, expected one of {tuple(architectures)} or an alias of one")
    return architectures[name]


@cache
def _data() -> dict:
    return json.loads((Path(__file__).parent / "devices.json").read_text(encoding="utf-8"))
