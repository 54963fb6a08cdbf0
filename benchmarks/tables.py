"""From winners to a tuning table: one file that holds both twins, and keeps what was not measured this time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssm_configs import Device, Table, read_table, table_file_name, write_table
from ssm_configs.spec import TWINS, Knobs, OpSpec, Statics

from .tuning_log import Config

SOURCE = "tuned by twin-ssm"
_MEASURED = "measured_us"


class Winner(dict[str, Any]):
    """The knobs of one twin at one size, with the time they took."""

    def __init__(self, config: Config, us: float):
        super().__init__(config)
        self.us = us


def table_path(folder: Path, spec: OpSpec, device: Device, dtype: str, statics: Statics) -> Path:
    return folder / spec.name / table_file_name(spec.name, device=device, dtype=dtype, **statics)


def assemble(
    spec: OpSpec,
    statics: Statics,
    device: Device,
    dtype: str,
    *,
    winners: Mapping[str, Mapping[int, Winner]],
    tuned_at: Mapping[int, Mapping[str, int]],
    earlier: Table | None,
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """`winners`: per twin that was measured, per size. Sizes and twins that were not keep their earlier entry.

    `metadata`: over what the table has; None takes a key away.
    """
    old_entries = {entry.size: entry for entry in earlier.entries} if earlier else {}
    old_times = dict(earlier.metadata.get(_MEASURED, {})) if earlier else {}
    measured_us: dict[str, dict[str, float]] = {}
    table: dict[str, Any] = {}
    for size in sorted(set(old_entries).union(*winners.values())):
        old = old_entries.get(size)
        times = dict(old_times.get(str(size), {}))
        own: dict[str, Knobs] = {}
        best = {twin: winners[twin][size] for twin in TWINS if size in winners.get(twin, {})}
        times |= {twin: round(winner.us, 3) for twin, winner in best.items()}

        if "triton" in best:
            shared: Knobs = {knob.name: best["triton"][knob.name] for knob in spec.knobs}
            if dict(best["triton"]) != shared:
                own["triton"] = dict(best["triton"])
        elif old:
            shared = dict(old.shared)
            if "triton" in old.own:
                own["triton"] = dict(old.own["triton"])
        else:
            shared = spec.heuristic(statics, dtype, device, size)

        # What Pallas was measured to want stays, also where it followed from shared knobs that are others now.
        pallas: Knobs | None = None
        if "pallas" in best:
            pallas = dict(best["pallas"])
        elif old and "pallas" in times:
            pallas = spec.launch_knobs("pallas", old.shared, old.own.get("pallas"), statics)
        if pallas is not None and pallas != spec.pallas_rule(shared, statics):
            own["pallas"] = pallas

        at = tuned_at.get(size) or (old.tuned_at if old else None)
        table[str(size)] = {**shared, **own, **({"tuned_at": dict(at)} if at else {})}
        if times:
            measured_us[str(size)] = times
    old_metadata = dict(earlier.metadata) if earlier else {}
    told = {key: value for key, value in {**old_metadata, **metadata}.items() if value is not None}
    return {**told, "source": SOURCE, _MEASURED: measured_us, **table}


def update(path: Path, spec: OpSpec, statics: Statics, device: Device, dtype: str, **parts: Any) -> None:
    """Writes the table at `path`, over what it says now."""
    earlier = read_table(path, spec, statics) if path.exists() else None
    table = assemble(spec, statics, device, dtype, earlier=earlier, **parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, table, spec, statics)
