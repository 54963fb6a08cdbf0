"""Triton's launch of a compiled kernel, down to its C function: what that is handed for given arguments.

`CompiledKernel` wraps it in look-ups of device and stream, two calls of hooks, metadata for them, a loop over the arguments,
and a new tensor map for every descriptor. The C function takes pointers as numbers, and then asks no driver about them either.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver

nvidia: Any
try:
    from triton.backends.nvidia import driver as nvidia
except ImportError:  # other vendors' builds
    nvidia = None

# gridX, gridY, gridZ, stream, function, cooperative grid, PDL, two scratches, metadata of the kernel and of the launch, two
# hooks; then the kernel's own. Another Triton may do it otherwise, and then launches go its own way.
_CONVENTION = "iiiKKppOOOOOO"
HEAD = len(_CONVENTION)
MAPS = 1024

STREAM = object()
"""Stands for the stream among the arguments."""


@dataclass(frozen=True)
class CLaunch:
    kernel: CompiledKernel
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    """As the C function takes them, but for tensors, `Described` ones and `STREAM`: `HEAD` of Triton's, then the kernel's."""
    types: tuple[str, ...]
    """Triton's names for the types of the kernel's own."""
    stream_of: Callable[[int], int]


class TensorMaps(dict[int, Any]):
    """The tensor maps of one descriptor argument, by address: nothing else of it changes from launch to launch."""

    def __init__(self, descriptor: Any, metadata: dict[str, Any]) -> None:
        super().__init__()
        fill = _active().utils.fill_tma_descriptor
        swizzle, elem_size, block = metadata["swizzle"], metadata["elem_size"], metadata["block_size"]
        elem_type = nvidia.TMA_DTYPE_DEVICE_TO_HOST[metadata["elem_type"]]
        shape, strides = list(descriptor.shape), list(descriptor.strides)
        padding = 1 if descriptor.padding == "nan" else 0
        self._fill = lambda address: fill(address, swizzle, elem_size, elem_type, block, shape, strides, padding)

    def __missing__(self, address: int) -> Any:
        if len(self) >= MAPS:
            self.clear()
        found = self[address] = self._fill(address)
        return found


@dataclass(frozen=True)
class Described:
    """A descriptor among the arguments: the tensor, and how to come from its address to a map."""

    base: torch.Tensor
    maps: TensorMaps


def _active() -> Any:
    return driver.active  # whose attributes are those of the vendor


def c_launch(compiled: Any, grid: tuple[int, int, int], arguments: tuple, constants: tuple) -> CLaunch | None:
    """None where Triton's own way is the only one."""
    if not isinstance(compiled, CompiledKernel) or getattr(nvidia, "_BASE_ARGS_FORMAT", None) != _CONVENTION:
        return None
    run: Any = compiled.run
    if type(run) is not nvidia.CudaLauncher or run.global_scratch_size or run.profile_scratch_size:
        return None
    types = list(compiled.src.signature.values())
    metadata = list(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    described = [isinstance(type_, str) and type_.startswith("tensordesc") for type_ in types]
    if len(metadata) != sum(described) or any(entry is None or entry["fp4_padded"] for entry in metadata):
        return None  # a descriptor that is passed in parts
    function = inspect.getclosurevars(run.launch).nonlocals.get("launcher") if any(described) else run.launch
    if function is None:
        return None
    flat: list[Any] = []
    flat_types: list[str] = []
    for argument, type_, is_descriptor in zip((*arguments, *constants), types, described, strict=True):
        if is_descriptor:
            rank = len(argument.shape)
            flat_types += ["nvTmaDesc", *["i32"] * rank, *["i64"] * rank]
            flat += [
                Described(argument.base, TensorMaps(argument, metadata.pop(0))),
                *argument.shape,
                *argument.strides,
            ]
        elif argument is None or isinstance(argument, (torch.Tensor, int, float, str, torch.dtype)):
            flat.append(argument)
            flat_types.append(str(type_))
        else:
            return None
    head = (
        *grid, STREAM, compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None,
        compiled.packed_metadata, None, None, None,
    )  # fmt: skip
    return CLaunch(compiled, function, (*head, *flat), tuple(flat_types), _active().get_current_stream)
