"""Which device a tensor is on, in the words of the tuning tables."""

import functools
import os

import torch
import triton
import triton.language as tl
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


def check_products(name: str, tensor: torch.Tensor) -> None:
    """TypeError where products of such a tensor would be wrong without an error: bfloat16 in Triton 3.6's interpreter."""
    if knobs.runtime.interpret and tensor.dtype is torch.bfloat16 and not _multiplies_bfloat16():
        raise TypeError(
            f"{name}: expected float32 or float16 under TRITON_INTERPRET=1, got bfloat16, of which Triton's interpreter "
            "multiplies the bits and not the values"
        )


@functools.cache
def _multiplies_bfloat16() -> bool:
    ones, product = torch.ones(16, 16, dtype=torch.bfloat16), torch.empty(16, 16)
    _square_kernel[(1,)](ones, product)
    return bool((product == 16).all())


@triton.jit
def _square_kernel(matrix_ptr, product_ptr):
    i = tl.arange(0, 16)
    place = i[:, None] * 16 + i[None, :]
    matrix = tl.load(matrix_ptr + place)
    tl.store(product_ptr + place, tl.dot(matrix, matrix))
