"""Working a call out once and launching it cheaply after.

Checking thirteen tensors and binding forty kernel arguments costs several times what the smallest kernels take. Both depend
only on shapes, strides, dtypes and options, so a call like an earlier one finds them under its key.
"""

import contextlib
import threading
from collections.abc import Hashable, Sequence

import torch
from torch.autograd import forward_ad
from triton import JITFunction
from triton.compiler import CompiledKernel

from ._arguments import has_tangent
from ._c_launch import c_launch
from ._hashes import settle
from ._recording import recording
from ._side_by_side import held

_CAPACITY = 8192


class Cache[Value]:
    """A dict that starts over when it is full: a process sees few kinds of calls, or no cache would help."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, Value] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        try:
            return self._entries.get(key)
        except TypeError:  # an option that is not hashable is for a check to refuse, by its name
            return None

    def __setitem__(self, key: Hashable, value: Value) -> None:
        with self._lock, contextlib.suppress(TypeError):
            if len(self._entries) >= _CAPACITY:
                self._entries = {}
            self._entries[key] = value


def call_key(tensors: Sequence[object], *options: Hashable) -> Hashable:
    """All that a check may look at. What is no tensor is known by its type, which is what it will be refused for."""
    seen: list[object] = [
        (type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
        if isinstance(tensor, torch.Tensor)
        else type(tensor)
        for tensor in tensors
    ]
    if forward_ad._current_level >= 0:
        seen += [has_tangent(tensor) for tensor in tensors]
    return torch.is_grad_enabled(), options, tuple(seen)


class Launcher:
    """A kernel whose constexpr parameters come last, launched without Triton's binder once its variant is known.

    `options` are Triton's own, such as maxnreg.
    """

    def __init__(self, kernel, **options: int) -> None:
        self._kernel, self._options = kernel, options
        self._compiled: Cache[CompiledKernel] = Cache()
        self._interpreted = not isinstance(kernel, JITFunction)
        self.is_new = not self._interpreted  # the interpreter compiles nothing

    def __call__(
        self, key: Hashable, grid: tuple[int, int, int], arguments: tuple, constants: tuple, num_warps: int
    ) -> None:
        if held.launches is not None:
            held.launches.append((self, (key, grid, arguments, constants, num_warps)))
            return
        # Triton specialises on the 16-byte alignment of every pointer, which no shape tells; and on integers, of which a
        # caller's `out` brings some that the key of the call does not have. (Lists: generators cost twice the time.)
        alignment = tuple([argument.data_ptr() % 16 for argument in arguments if isinstance(argument, torch.Tensor)])
        integers = tuple([argument for argument in arguments if type(argument) is int])
        key = (key, alignment, integers, constants, num_warps)
        device = arguments[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current device
                self._launch(key, grid, arguments, constants, num_warps)
        else:
            self._launch(key, grid, arguments, constants, num_warps)

    def compile_ahead(
        self, key: Hashable, grid: tuple[int, int, int], arguments: tuple, constants: tuple, num_warps: int
    ) -> None:
        """All but the launch. What goes wrong, or is forbidden, goes wrong once more when it is launched."""
        device = arguments[0].device
        current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with contextlib.suppress(Exception), current:
            settle(self._kernel)
            compiled = self._kernel.warmup(*arguments, *constants, grid=grid, num_warps=num_warps, **self._options)
            compiled.run  # noqa: B018  (which builds its launcher in C, and loads it)

    def _launch(self, key, grid, arguments, constants, num_warps) -> None:
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments, *constants)
        else:
            if self._interpreted:
                from ._interpreter import mend  # and Triton's own, which no GPU wants

                mend()
            settle(self._kernel)
            compiled = self._kernel[grid](*arguments, *constants, num_warps=num_warps, **self._options)
            self.is_new = False
            if isinstance(compiled, CompiledKernel):  # the interpreter returns nothing
                self._compiled[key] = compiled
        if recording.recorder is not None:
            recording.recorder.launched(c_launch(compiled, grid, arguments, constants))
