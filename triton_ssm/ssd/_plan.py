"""What the SSD operators work out once for every kind of call: its sizes, and how its tensors lie."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ssm_configs.contracts.ssd import Dims

from .. import _arguments
from .._device import tuning_device_of

# Of torch.Tensor | None; which one of them is None is the contract's matter.
Tensors = tuple[Any, ...]


_LONGEST_CHUNK = 2048


@dataclass(frozen=True, eq=False)  # compared by identity, which makes it the cheapest of keys
class Plan:
    dims: Dims
    copied: tuple[int, ...]
    """Which tensors a kernel can read only as dense copies."""
    strides: dict[str, tuple[int, int]]
    """Elements from batch row to batch row and from token to token, of the tensors that have tokens."""
    device: Any
    dtype: str
    """That by which the tuning table goes."""

    def apply(self, tensors: Tensors) -> Tensors:
        if not self.copied:
            return tensors
        return tuple(
            tensor.contiguous() if index in self.copied and tensor is not None else tensor
            for index, tensor in enumerate(tensors)
        )

    def products(self, precision: str) -> str:
        """Triton's word for how the operands of tensor cores are multiplied."""
        if self.dtype != "float32" or precision == "tf32":
            # 16-bit operands have one way only, and two words for it would be two compiles.
            return "ieee" if self.dtype != "float32" else "tf32"
        # Three products of tf32 are as exact as fp32's own (2.4e-7 and 2.9e-7 of y on an H200) and took 2.3 ms where those,
        # outside tensor cores, took 5.4 (8192 tokens of 128 heads). Only NVIDIA's compiler has them, from Ampere on.
        capability = self.device.capability
        return "tf32x3" if capability is not None and capability[0] >= 8 else "ieee"

    def request(self, size: int, **statics: int) -> dict[str, Any]:
        """What the tuning table of a stage is asked for."""
        return {"twin": "triton", "device": self.device, "dtype": self.dtype, "size": size, **statics}


def make_plan(
    op: str,
    names: Sequence[str],
    required: int,
    tensors: Tensors,
    check: Callable[..., Dims],
    *,
    tokens: Sequence[str] = (),
    free: Sequence[str] = (),
    dtype_of: str = "",
    **options: Any,
) -> Plan:
    """Raises where the call is not legal.

    Args:
        op: its name, for errors.
        names, tensors: the operator's tensors, the first `required` of which must be there.
        check: the contract's.
        tokens: names of tensors [B,T,…] whose batch rows and tokens may be any distance apart.
        free: names of tensors that the operator looks after itself. All others are read dense.
        dtype_of: the tensor whose dtype the tuning table goes by; the first without it.
    """
    named: dict[str, Any] = dict(zip(names, tensors, strict=True))
    _arguments.check_tensors(named, op, required)
    dims = _arguments.checked(check, named, **options)
    copied, strides = [], {}
    for index, (name, tensor) in enumerate(named.items()):
        if tensor is None or name in free:
            continue
        if not (_has_dense_tokens(tensor) if name in tokens else tensor.is_contiguous()):
            copied.append(index)
            tensor = tensor.contiguous()
        if name in tokens:
            strides[name] = _token_strides(tensor)
    first = named[dtype_of or names[0]]
    return Plan(
        dims, tuple(copied), strides, tuning_device_of(names[0], first.device), _arguments.dtype_name(first.dtype)
    )


def _has_dense_tokens(tensor: torch.Tensor) -> bool:
    """Whether all axes but batch and tokens are dense, and a chunk's tokens no more than 2^31 elements apart."""
    return tensor.numel() == 0 or (tensor[0, 0].is_contiguous() and tensor.stride(1) < 2**31 // _LONGEST_CHUNK)


def _token_strides(tensor: torch.Tensor) -> tuple[int, int]:
    # A single batch row has no stride to speak of.
    return tensor.stride(0) if tensor.shape[0] > 1 else 0, tensor.stride(1)


def dense_output(like: torch.Tensor, out: Any, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """The buffer for y: `out`, if it fits and is dense, else a new one."""
    y = _arguments.output_like(like, out, shape)
    if not y.is_contiguous():
        raise ValueError(f"out: expected a dense tensor, got strides {y.stride()}")
    return y


def state_dtype_name(dtype: Any) -> str:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"state_dtype: expected a torch.dtype, got {type(dtype).__name__}")
    return _arguments.dtype_name(dtype)


def block(size: int, of: int) -> int:
    """A block of at most `size` elements that is no longer than `of` needs, and long enough for a tensor core."""
    return max(16, min(size, 1 << (of - 1).bit_length()))
