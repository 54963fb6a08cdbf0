"""What a measurement depends on besides shape and config: device, driver, versions, and the kernels' own source."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import torch

_PACKAGES = {"triton": ("torch", "triton"), "pallas": ("jax", "jaxlib")}


def command() -> str:
    return " ".join(["python -m benchmarks", *sys.argv[1:]])


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "driver": driver(), "cuda": torch.version.cuda or "none"}
    for package in (*_PACKAGES["triton"], *_PACKAGES["pallas"], "numpy"):
        found[package] = _version(package)
    return found


@functools.cache
def twin_identity(twin: str) -> dict[str, str]:
    """What decides a twin's times on a given device: measurements under another identity do not count.

    The driver is left out: tables outlive its updates.
    """
    return {package: _version(package) for package in _PACKAGES[twin]} | {"source": _digest(f"{twin}_ssm")}


@functools.cache
def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _digest(package: str) -> str:
    """Of the package's sources, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return "none"
    digest = hashlib.sha256()
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
