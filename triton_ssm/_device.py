"""Which device a tensor is on, in the words of the tuning tables."""

import functools
import os

import torch
from triton import knobs

from ssm_configs import Device

# Where the interpreter runs a kernel there is no GPU to ask: it stands in for the one that the tables were measured on.
INTERPRETED_DEVICE = Device("NVIDIA H200", (9, 0))


@functools.cache
def _cuda_device(index: int) -> Device:
    major, minor = torch.cuda.get_device_capability(index)
    # An AMD device's capability counts in AMD's own generations and says nothing about Blackwell.
    return Device(torch.cuda.get_device_name(index), None if torch.version.hip else (major, minor))


def tuning_device(device: torch.device) -> Device:
    """The device whose table serves `device`; ValueError where no kernel can run."""
    if device.type == "cuda":
        return _cuda_device(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "xpu":
        return Device(torch.xpu.get_device_name(device))
    if device.type == "cpu" and knobs.runtime.interpret:
        name = os.environ.get("SSM_DEVICE_NAME")
        return Device(name) if name else INTERPRETED_DEVICE
    raise ValueError(
        f"expected a GPU tensor (or a CPU tensor with TRITON_INTERPRET=1 set before triton is imported), got device {device}"
    )


def tuning_device_of(name: str, device: torch.device) -> Device:
    """`tuning_device` for an argument on `device`, which the error names."""
    try:
        return tuning_device(device)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
