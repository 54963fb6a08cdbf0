"""What a call allocates and launches, noted while it runs, and a program that does it again.

A program knows its call's tensors by their place among the arguments. That is sound because nothing else reaches a kernel: a
recording in which torch computes anything (a copy of a tensor that is not dense, a seed), in which a view begins elsewhere
than its tensor, or in which an argument is empty and so has no address to know it by, is none. Of arguments with one address
the last one stands for all, so they must have one address again (`_replay.py`).
"""

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ._c_launch import STREAM, CLaunch, Described, TensorMaps
from ._native import issue

_ALIGNMENT = 512  # of scratch: as far apart as torch's allocator puts tensors
_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
}


class _Recording(threading.local):
    recorder: "Recorder | None" = None


recording = _Recording()


class Recorder(TorchDispatchMode):
    """Sees every tensor that is made and, through `Launcher`, every launch."""

    def __init__(self, values: tuple) -> None:
        super().__init__()
        self._values = values
        self._tensors = [value for value in values if isinstance(value, torch.Tensor)]
        self._made: list[torch.Tensor] = []  # and kept: no two may have one address
        self._launches: list[CLaunch] = []
        self._repeatable = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Torch would have Dynamo leave `__torch_dispatch__` alone, and import it for that: 2 s of somebody's second call.
        return False

    def __enter__(self) -> "Recorder":
        super().__enter__()
        recording.recorder = self
        return self

    def __exit__(self, *raised: Any) -> None:
        recording.recorder = None
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self._made.append(result)
        elif not (func.is_view and isinstance(result, torch.Tensor) and result.data_ptr() == args[0].data_ptr()):
            self._repeatable = False
        return result

    def launched(self, launch: CLaunch | None) -> None:
        if launch is None:
            self._repeatable = False
        else:
            self._launches.append(launch)

    def program(self, result: Any) -> "Program | None":
        """None where the call cannot be repeated."""
        if not self._repeatable or not self._tensors or any(tensor.data_ptr() == 0 for tensor in self._tensors):
            return None
        device = self._tensors[0].device
        if any(tensor.device != device or tensor.data_ptr() % 16 for tensor in self._made):
            return None
        try:
            return Program(self._values, self._tensors, self._made, self._launches, result)
        except _Unknown:
            return None


class _Unknown(Exception):
    """A tensor that is neither an argument of the call nor made by it."""


class Program:
    """The outputs and launches of one kind of call.

    Every launch picks its arguments from one pool of numbers: the pointers of the call's tensors, of its outputs and of its
    scratch, the stream, the tensor maps, and all that never changes. `issue` is the same for `_native.c`, where that serves.
    """

    def __init__(
        self, values: tuple, tensors: list[torch.Tensor], made: list[torch.Tensor], launches: list[CLaunch], result: Any
    ) -> None:
        outputs = [tensor for tensor in made if _holds(result, tensor)]
        self.result = _form_of(result, values, outputs)
        scratch = [tensor for tensor in made if not _holds(result, tensor) and tensor.numel()]
        places = {tensor.data_ptr(): place for place, tensor in enumerate((*tensors, *outputs, *scratch))}
        places[0] = -1  # of a tensor without elements
        self.offsets, size = _laid_out(scratch)
        self.scratch = ((size,), (1,), torch.uint8) if size else None
        self.outputs = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in outputs]
        self.device: torch.device = tensors[0].device
        self.stream_of = launches[0].stream_of if launches else lambda index: 0
        self.current_device, self.empty = _device_functions(self.device)
        self.raw = _raw_memory(self.device)
        self.kernels = [launch.kernel for launch in launches]  # whose modules stay loaded while they are referred to

        def tensor_place(tensor: torch.Tensor) -> int:
            place = places.get(tensor.data_ptr())
            if place is None:
                raise _Unknown
            return place

        self.issue = issue(launches, tensor_place)
        n_pointers = len(tensors) + len(outputs) + len(scratch)
        maps: list[tuple[int, TensorMaps]] = []
        constants: list[Any] = [0]
        first = n_pointers + 1  # the stream stands between
        n_maps = sum(isinstance(argument, Described) for launch in launches for argument in launch.arguments)

        def place_of(argument: Any) -> int:
            if isinstance(argument, torch.Tensor):
                place = tensor_place(argument)
                return place if place >= 0 else first + n_maps
            if argument is STREAM:
                return n_pointers
            if isinstance(argument, Described):
                maps.append((tensor_place(argument.base), argument.maps))
                return first + len(maps) - 1
            constants.append(argument)
            return first + n_maps + len(constants) - 1

        self._launches = [
            (launch.function, operator.itemgetter(*map(place_of, launch.arguments))) for launch in launches
        ]
        self._maps, self._constants = maps, constants

    def __call__(self, values: tuple, pointers: list[int]) -> Any:
        if self.current_device() != self.device.index:
            with torch.cuda.device(self.device):  # kernels are launched on the current device
                return self._run(values, pointers)
        return self._run(values, pointers)

    def _run(self, values: tuple, pool: list[Any]) -> Any:
        outputs = [self.empty(*output) for output in self.outputs]
        for output in outputs:
            pool.append(output.data_ptr())
        if self.scratch is not None:
            scratch = self.empty(*self.scratch)  # held until everything is launched
            start = scratch.data_ptr()
            pool += [start + offset for offset in self.offsets]
        pool.append(self.stream_of(self.device.index))  # type: ignore[arg-type]
        if self._maps:
            pool += [addresses[pool[place]] for place, addresses in self._maps]
        pool += self._constants
        for launch, arguments_of in self._launches:
            launch(*arguments_of(pool))
        return _made_of(self.result, values, outputs)


def _holds(result: Any, tensor: torch.Tensor) -> bool:
    return any(_holds(part, tensor) for part in result) if isinstance(result, tuple) else _is(result, tensor)


def _is(result: Any, made: torch.Tensor) -> bool:
    """Torch hands out another object than the one that a mode sees; no two of these have one address."""
    return (
        isinstance(result, torch.Tensor)
        and result.data_ptr() == made.data_ptr()
        and (result.shape, result.stride(), result.dtype) == (made.shape, made.stride(), made.dtype)
    )


def _form_of(result: Any, values: tuple, outputs: Sequence[torch.Tensor]) -> Any:
    """Where a result comes from: None, the number of an argument, of an output (from -1 down), or a tuple of such."""
    if result is None:
        return None
    if type(result) is tuple:
        return tuple([_form_of(part, values, outputs) for part in result])
    for index, value in enumerate(values):
        if result is value:
            return index
    for index, made in enumerate(outputs):
        if _is(result, made):
            return -1 - index
    raise _Unknown


def _made_of(form: Any, values: tuple, outputs: Sequence[torch.Tensor]) -> Any:
    if form is None:
        return None
    if type(form) is tuple:
        return tuple([_made_of(part, values, outputs) for part in form])
    return values[form] if form >= 0 else outputs[-1 - form]


def _laid_out(scratch: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Where each begins in one piece of memory, and its size."""
    offsets, size = [], 0
    for tensor in scratch:
        offsets.append(size)
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size += -(-extent * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return offsets, size


def _device_functions(device: torch.device) -> tuple[Callable[[], int | None], Callable[..., torch.Tensor]]:
    """The index of the current device; and `torch.empty_strided` on the current device, (shape, strides, dtype).

    The functions that inductor's programs use take a third of the time of torch's public ones.
    """
    guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)

    def plainly(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    empty = getattr(guards, f"_empty_strided_{device.type}", plainly)
    if device.type != "cuda":
        return lambda: device.index, empty
    return getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device), empty


def _raw_memory(device: torch.device) -> tuple[Any, Any]:
    """The allocator that makes tensors, without them: they take as long again. (size, stream) -> address; and (address)."""
    names = "_cuda_cudaCachingAllocator_raw_alloc", "_cuda_cudaCachingAllocator_raw_delete"
    functions = [getattr(torch._C, name, None) if device.type == "cuda" else None for name in names]
    return (None, None) if None in functions else (functions[0], functions[1])
