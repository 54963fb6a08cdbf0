"""Compiled programs in a folder: another process loads and calls them without a trace.

A file is named by a digest of all that decides its program, so nothing ever has to be declared out of date: changed sources,
tables, versions or flags lead to another name. Files hold pickles and machine code: whoever can write to the folder can run
code in the processes that read it, so it has to be as trusted as JAX's own compilation cache.
"""

import functools
import hashlib
import json
import logging
import os
import pickle
import platform
import tempfile
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
from jax._src.config import trace_context, trace_context_names
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

import ssm_configs
from ssm_configs.search import SSM_FOLDER, VLLM_FOLDER

from ._device import interpreting
from ._warmup_jitted import Jitted, donated

FOLDER = "pallas_ssm_programs"
# What XLA and Mosaic GPU read, beside JAX's own settings.
_VARIABLES = ("XLA_FLAGS", "MOSAIC_", "SSM_DEVICE_NAME", "NVIDIA_TF32_OVERRIDE")
# Settings of the compiler; `trace_context` has those of the trace.
_COMPILER_SETTINGS = (
    "jax_disable_most_optimizations", "jax_optimization_level", "jax_memory_fitting_level", "jax_compiler_enable_remat_pass",
)  # fmt: skip
# They describe how a call came about and not what it computes.
_NOT_SETTINGS = ("jax_default_device", "jax_disable_jit")
_CHECKSUM = 32

_log = logging.getLogger("pallas_ssm.warmup")
_at_import = dict(zip(trace_context_names(), trace_context(), strict=True))


class Store:
    """The programs of one folder."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self._folder = Path(folder) / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)

    def holds(self, name: str) -> bool:
        return self._path(name).exists()

    def save(self, name: str, program: jax.stages.Compiled) -> None:
        """Whole or not at all, whoever else writes the same. `program` has to come from the compiler."""
        payload, _, out_tree = serialize_executable.serialize(program)
        results = jax.tree.unflatten(out_tree, range(out_tree.num_leaves))
        body = pickle.dumps((payload, len(jax.tree.leaves(program.args_info)), results))
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=".")
        try:
            with open(handle, "wb") as file:
                file.write(hashlib.sha256(body).digest() + body)
            os.replace(temporary, self._path(name))
        except BaseException:
            os.unlink(temporary)
            raise

    def load(self, name: str, device: Any) -> jax.stages.Compiled | None:
        """None where there is no such program; a file that cannot be loaded is removed."""
        path = self._path(name)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        try:
            checksum, body = content[:_CHECKSUM], content[_CHECKSUM:]
            if hashlib.sha256(body).digest() != checksum:
                raise ValueError("it is damaged")
            payload, arguments, results = pickle.loads(body)
            in_tree = jax.tree.structure((tuple(range(arguments)), {}))
            return serialize_executable.deserialize_and_load(
                payload, in_tree, jax.tree.structure(results), backend=device.client, execution_devices=[device]
            )
        except Exception as error:
            _log.warning("%s: a stored program is made anew: %s: %s", path, type(error).__name__, error)
            path.unlink(missing_ok=True)
            return None

    def _path(self, name: str) -> Path:
        return self._folder / name


@contextmanager
def without_jax_cache() -> Iterator[None]:
    """Programs that come from the compiler, for all threads: one that JAX's cache on disk held cannot be stored again. What
    XLA makes of it loads, and fails when it is called."""
    before = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX asks once whether there is one
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def digest_circumstances(device: Any) -> str | None:
    """A digest of what decides programs beside operator, options and shapes. None where that cannot be told: under an
    override, in Mosaic GPU's interpreter (whose programs call back into their process), under unknown contexts."""
    settings = _settings()
    sources = _sources(ssm_configs.circumstances())
    if settings is None or sources is None or ssm_configs.override_token() is not None or interpreting():
        return None
    client = device.client
    about = {
        "versions": [jax.__version__, jaxlib.version.__version__, client.platform, client.platform_version],
        "device": [device.device_kind, getattr(device, "compute_capability", None), device.id],
        "processor": _processor(),
        "settings": settings,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
        "sources": sources,
    }
    return _digest(about)


def name_of(function: Jitted, shapes: Mapping[str, Any], circumstances: str) -> str:
    """A program's file name. Its options are those of warm-up: names and numbers."""
    arrays = {name: [list(shape.shape), str(shape.dtype)] for name, shape in sorted(shapes.items())}
    return _digest([function.op, repr(function.options), arrays, donated(function.op, arrays), circumstances])


def settings_here() -> dict[str, Any]:
    """What another process has to set in `jax.config` to make the same programs."""
    values = dict(zip(trace_context_names(), trace_context(), strict=True))
    found = {name: value for name, value in values.items() if name.startswith("jax_") and _is_setting(name, value)}
    return found | _of_compiler()


def _settings() -> dict[str, Any] | None:
    found = {}
    for name, value in zip(trace_context_names(), trace_context(), strict=True):
        # One that came with a part of JAX which not every process imports says nothing as long as it is off.
        everywhere = name in _at_import and name.startswith("jax_")
        if name in _NOT_SETTINGS or not (everywhere or value):
            continue
        if _is_setting(name, value):
            found[name] = repr(value)
        elif value != _at_import.get(name):
            return None
    return found | _of_compiler()


def _of_compiler() -> dict[str, Any]:
    values = jax.config.values
    return {name: values[name] for name in _COMPILER_SETTINGS}


@functools.cache
def _processor() -> str:
    """Programs hold code for it, if only what launches a kernel, and one processor's may be illegal on another."""
    try:
        lines = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
    except OSError:
        return platform.processor()
    return "".join(sorted(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))))


def _is_setting(name: str, value: Any) -> bool:
    return name not in _NOT_SETTINGS and (value is None or isinstance(value, bool | int | float | str | Enum))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# Read once: what this process runs is what it imported, and a changed table counts after `ssm_configs.clear_cache()`.
@functools.cache
def _sources(_: Hashable) -> str | None:
    digest = hashlib.sha256()
    packages = [Path(file).parent for file in (__file__, ssm_configs.__file__) if file]
    folders = [Path(folder) for name in (SSM_FOLDER, VLLM_FOLDER) if (folder := os.environ.get(name))]
    found = False
    for folder in (*packages, *folders):
        for path in _files(folder):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder)}:{len(content)}:".encode() + content)
            found = True
        digest.update(b"\0")
    return digest.hexdigest() if found else None


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".json"))
