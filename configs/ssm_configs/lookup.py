"""`lookup` and `explain`: which launch config a call gets, and why."""

import os
import threading
import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

from .config import Config
from .devices import Device
from .environment import reader
from .overrides import Token, merge, override_token
from .search import SSM_FOLDER, VLLM_FOLDER, Row, Step, find_row, forget_tables
from .spec import TWINS, Knob, Knobs, OpSpec, check_knobs
from .specs import get_spec


class TableWarning(UserWarning):
    """No tuning table was found where one could be."""


@dataclass(frozen=True)
class Explanation:
    """Every rule that a look-up tried, in order, and the config it ended with."""

    request: str
    steps: tuple[Step, ...]
    config: Config
    warnings: tuple[str, ...]
    """What `lookup` warns of, once each."""

    def __str__(self) -> str:
        width = max(len(step.rule) for step in self.steps)
        lines = [f"  {step.rule:<{width}}  {step.outcome}" for step in self.steps]
        return "\n".join([self.request, *lines, f"  => {self.config.source}: {self.config}"])


def lookup(op: str, *, twin: str, device: Device, dtype: str, size: int, **static: int) -> Config:
    """The launch config of `op` for one call.

    `twin` is "triton" or "pallas"; `dtype`, `size` and `**static` are what the operator's `OpSpec` asks for. The order
    is `override(...)`, `SSM_TUNED_CONFIG_FOLDER`, `VLLM_TUNED_CONFIG_FOLDER`, the shipped tables, the written heuristic
    (`search.py` has the rules); among a table's keys the nearest by absolute distance wins, ties to the lower.

    Results are cached for all threads: a changed environment variable or override takes effect at once, a changed file
    after `clear_cache()`. A missing table gives one `TableWarning` per file name, a malformed one raises `TableError`,
    a wrong argument `TypeError` or `ValueError`.
    """
    answer = explain(op, twin=twin, device=device, dtype=dtype, size=size, **static)
    if answer.warnings:
        _warn_once(answer.warnings)
    return answer.config


def explain(op: str, *, twin: str, device: Device, dtype: str, size: int, **static: int) -> Explanation:
    """What `lookup` returns for the same arguments and how it came about; `str()` prints it. Gives no warning."""
    folders = os.environ.get(SSM_FOLDER), os.environ.get(VLLM_FOLDER)
    try:
        return _resolve(op, twin, device, dtype, size, folders, override_token(), **static)
    except TypeError:
        # An unhashable argument fails in the cache, before the checks that would name it.
        _check(op, twin, device, dtype, size, static)
        raise


def circumstances() -> Hashable:
    """What decides a look-up beside its arguments: while this is equal, equal look-ups have equal answers."""
    return override_token(), _folders(), _generation


_folders = reader(SSM_FOLDER, VLLM_FOLDER)
_generation = 0


def clear_cache() -> None:
    """Forget results, tables and the warnings already given, so that changed files are read."""
    global _generation
    _generation += 1
    _resolve.cache_clear()
    forget_tables()
    with _warned_lock:
        _warned.clear()


# typed: as keys 64, 64.0 and True can be equal, and only the first may pass the checks.
@lru_cache(maxsize=8192, typed=True)
def _resolve(
    op: str,
    twin: str,
    device: Device,
    dtype: str,
    size: int,
    folders: tuple[str | None, str | None],
    token: Token | None,
    **static: int,
) -> Explanation:
    """The one place where a look-up is decided."""
    spec = _check(op, twin, device, dtype, size, static)
    shared, own = merge(token, op, twin)
    steps = [Step("override", _show(shared | own) or "none")]

    # Where the overrides leave nothing open, no table is read, missed or found malformed.
    row = _NO_ROW
    if _covers(own, spec.knobs_of(twin)):
        knobs = own
    else:
        if not _covers(shared, spec.knobs):
            row = find_row(spec, device, spec.table_dtype(dtype), size, static, folders)
            steps.extend(row.steps)
        base = row.shared | shared
        # Shared knobs that are pinned overrule the row's Pallas object, which was measured in place of other ones.
        row_own = None if shared and twin == "pallas" else row.own.get(twin)
        knobs = spec.launch_knobs(twin, base, row_own, static) | own
        if row_own is not None:
            steps.append(Step("own knobs", f'the entry\'s "{twin}" object: {_show(row_own)}'))
        elif twin == "pallas":
            steps.append(Step("pallas_rule", f"from {_show(base)}"))

    if shared or own:
        try:
            check_knobs(spec.knobs_of(twin), knobs, static)
        except ValueError as error:
            raise ValueError(f"override({op!r}): {error}") from None
    config = Config(
        tuple((knob.name, knobs[knob.name]) for knob in spec.knobs_of(twin)),
        "override" if shared or own else row.source,
        row.path,
        row.key,
    )
    sizes = ", ".join(f"{key}={static[key]}" for key in spec.static_keys)
    request = f"{op} [{twin}] on {device.name}: {sizes}, {dtype}, size {size} = {spec.size_key}"
    return Explanation(request, tuple(steps), config, row.warnings)


def _check(op: str, twin: str, device: Device, dtype: str, size: int, static: dict[str, int]) -> OpSpec:
    spec = get_spec(op)
    if twin not in TWINS:
        raise ValueError(f"{op}: twin: got {twin!r}, expected one of {TWINS}")
    if not isinstance(device, Device):
        raise TypeError(f"{op}: device: expected ssm_configs.Device, got {device!r} ({type(device).__name__})")
    spec.table_dtype(dtype)
    if type(size) is not int:
        raise TypeError(f"{op}: size: expected int, got {size!r} ({type(size).__name__})")
    if size < 0:
        raise ValueError(f"{op}: size: got {size}, expected {spec.size_key}, at least 0")
    spec.check_statics(static)
    return spec


_NO_ROW = Row("override", shared={}, own={})


def _covers(given: Knobs, knobs: tuple[Knob, ...]) -> bool:
    return all(knob.name in given for knob in knobs)


def _show(knobs: Knobs) -> str:
    return ", ".join(f"{name}={value}" for name, value in knobs.items())


_warned: set[str] = set()
_warned_lock = threading.Lock()


def _warn_once(messages: tuple[str, ...]) -> None:
    with _warned_lock:
        new = [message for message in messages if message not in _warned]
        _warned.update(new)
    for message in new:
        warnings.warn(message, TableWarning, stacklevel=3)  # the caller of lookup
