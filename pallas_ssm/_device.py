"""Which device a computation will run on, in the words of the tuning tables."""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax._src import config as jax_config
from jax.core import Tracer

from ssm_configs import Device

# Where the interpreter runs a kernel there is no GPU to ask: it stands in for the one that the tables were measured on.
INTERPRETED_DEVICE = Device("NVIDIA H200", (9, 0))


class Target(NamedTuple):
    """Where a computation will run."""

    platform: str
    """"gpu", "cpu", ..., or "interpreter": a CPU on which Mosaic GPU's interpreter runs the kernels."""
    device: Device | None
    """The device whose tables serve it; None where no kernel of ours can run."""
    varying: bool = False
    """Whether it is part of a `jax.shard_map` with check_vma=True and not the same on all devices."""


def interpreting() -> bool:
    """Whether `plgpu.force_gpu_interpret_mode` (or its global form) is in force. JAX has no public way to ask."""
    return jax_config.pallas_tpu_interpret_mode_context_manager.value is not None


def target(arrays: Iterable[Any]) -> Target:
    """Where a call on `arrays` will run.

    An argument that was put on a device decides, else `jax.default_device`, else JAX's default backend. A traced
    argument has no device: for a program that `jax.jit` compiles for another one than the default (or ahead of time, for
    a topology), set `jax.default_device` to it, which JAX's own lowering asks for too.
    """
    arrays = tuple(arrays)
    varying = any(isinstance(array, Tracer) and jax.typeof(array).manual_axis_type.varying for array in arrays)
    device = _committed(arrays) or jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    # A program for a GPU is compiled, not interpreted, whatever the interpreter is told.
    if device.platform == "cpu" and interpreting():
        name = os.environ.get("SSM_DEVICE_NAME")
        return Target("interpreter", Device(name) if name else INTERPRETED_DEVICE, varying)
    if device.platform != "gpu":
        return Target(device.platform, None)
    capability = getattr(device, "compute_capability", None)
    major, _, minor = str(capability or "").partition(".")
    return Target("gpu", Device(device.device_kind, (int(major), int(minor)) if minor.isdigit() else None), varying)


def _committed(arrays: Iterable[Any]) -> Any:
    """The device of the first argument that was put on one, or None."""
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, Tracer) and array.committed:
            return next(iter(array.devices()))
    return None
