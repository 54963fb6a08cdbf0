"""Recorded calls done again in C (`_native.c`): a call's check, its outputs and its launches in one call of Python's.

Triton's launchers take 0.5 us to parse forty arguments that Python put together in as long, and the check of a dozen tensors
and options takes Python 3. Here the kernels' parameters are laid out once, as the driver takes them. Where that cannot be (no
compiler, another Triton, a driver that does not tell a kernel's parameters) calls are replayed in Python.
"""

import ctypes
import functools
import struct
import sys
import threading
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.runtime.build import compile_module_from_src

from ._c_launch import HEAD, MAPS, CLaunch, Described, TensorMaps, nvidia

_MAP = 128
_CODES = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip


class EntryPoints(NamedTuple):
    """Addresses of libcuda's functions, and what it tells of a kernel's parameters: the size of each."""

    launch: int
    context: int
    message: int
    sizes: Callable[[int], list[int]]


class Issue(NamedTuple):
    """The launches of a call: parameters, and where pointers and tensor maps go in them. As `_native.c` reads it."""

    launches: bytes
    parameters: bytes
    template: bytes
    patches: bytes
    map_patches: bytes
    maps: tuple[dict[int, bytes], ...]


class _MapBytes(dict[int, bytes]):
    """The 128 bytes of `TensorMaps`."""

    def __init__(self, maps: TensorMaps) -> None:
        super().__init__()
        self._maps = maps

    def __missing__(self, address: int) -> bytes:
        if len(self) >= MAPS:
            self.clear()
        found = self[address] = bytes_of_map(self._maps[address])
        return found


def bytes_of_map(made: Any) -> bytes:
    """What `cuTensorMapEncodeTiled` wrote: Triton's object is its head, then at the next multiple of 128 the map."""
    if type(made).__basicsize__ != 2 * _MAP or id(made) % _MAP:
        raise TypeError(f"a tensor map: expected Triton's PyCUtensorMap, got {type(made)}")
    return ctypes.string_at(id(made) + _MAP, _MAP)


@functools.cache
def native() -> Any:
    """The module, or None. The first process on a machine waits half a second for the C compiler."""
    if nvidia is None or torch.version.hip is not None or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    try:
        return compile_module_from_src(
            src=Path(__file__).with_name("_native.c").read_text(),
            name="twin_ssm_replay",
            include_dirs=nvidia.include_dirs,
        )
    except Exception:  # whatever a compiler, a cache's folder or a loader may have against it
        return None


_building: threading.Thread | None = None


def is_ready() -> bool:
    """Whether `native()` answers at once. The first question has it built meanwhile."""
    global _building
    if native.cache_info().currsize:
        return True
    if _building is None:
        _building = threading.Thread(target=native, name=__name__)
        try:
            _building.start()
        except RuntimeError:  # no thread to be had
            native()
    return False


@functools.cache
def entry_points() -> EntryPoints | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        functions = driver.cuLaunchKernelEx, driver.cuCtxGetCurrent, driver.cuGetErrorString
        ask = driver.cuFuncGetParamInfo  # from CUDA 12.4 on
    except (OSError, AttributeError):
        return None

    def sizes(function: int) -> list[int]:
        found, offset, size = [], ctypes.c_size_t(), ctypes.c_size_t()
        while not ask(ctypes.c_void_p(function), ctypes.c_size_t(len(found)), ctypes.byref(offset), ctypes.byref(size)):
            found.append(size.value)
        return found

    launch, context, message = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return EntryPoints(launch, context, message, sizes)


def issue(launches: Sequence[CLaunch], place_of: Callable[[torch.Tensor], int]) -> Issue | None:
    """`place_of`: a tensor's place among a call's pointers, or -1 for none. None where Triton's launchers are needed."""
    driver = entry_points() if native() is not None else None
    if driver is None:
        return None
    records, parameters, patches, map_patches = (array("q") for _ in range(4))
    template, maps = bytearray(), []
    for launch in launches:
        gridX, gridY, gridZ, _, function, cooperative, pdl, _, _, (num_warps, num_ctas, shared), *_ = launch.arguments
        if num_ctas != 1:
            return None
        sizes = []
        # After a kernel's own come the addresses of two scratches, which `c_launch` has seen to be none.
        for type_, argument in (*zip(launch.types, launch.arguments[HEAD:], strict=True), ("*", None), ("*", None)):
            if type_ == "constexpr":
                continue
            template += bytes(-len(template) % (64 if isinstance(argument, Described) else 8))
            parameters.append(len(template))
            if isinstance(argument, Described):
                map_patches.extend((len(template), place_of(argument.base)))
                maps.append(_MapBytes(argument.maps))
                try:
                    packed = maps[-1][argument.base.data_ptr()]
                except TypeError:  # another Triton's
                    return None
            elif isinstance(argument, torch.Tensor):
                packed = bytes(8)
                if place_of(argument) >= 0:
                    patches.extend((len(template), place_of(argument)))
            else:
                packed = _packed(type_, argument)
                if packed is None:
                    return None
            sizes.append(len(packed))
            template += packed
        if sizes != driver.sizes(function):
            return None
        if gridX * gridY * gridZ:
            records.extend((function, gridX, gridY, gridZ, 32 * num_warps, shared, cooperative, pdl, len(sizes)))
        else:
            del parameters[len(parameters) - len(sizes) :]
    return Issue(
        records.tobytes(), parameters.tobytes(), bytes(template), patches.tobytes(), map_patches.tobytes(), tuple(maps)
    )


def replay(
    *, names: tuple[str, ...], options: Sequence[Any], tensors: Sequence[int], alignment: Sequence[int],
    same_as: Sequence[int], twin_of: Sequence[int], check: Callable[..., bool],
    circumstances: Sequence[tuple[Callable[[], Any], Any]],
    empty: Callable[..., torch.Tensor], outputs: Sequence[tuple], scratch: tuple | None, offsets: Sequence[int],
    raw: tuple[Any, Any], stream_of: Callable[[int], int], device: int | None, issue: Issue, result: Any,
    kernels: Sequence[Any],
) -> Any:  # fmt: skip
    """Something whose `attempt(args, kwargs)` is a call's result, or NotImplemented for one of another kind.

    Args:
        names: of keywords, in turn.
        options: the arguments that are no tensors; `tensors`: the places of those that are.
        alignment: the tensors' addresses' last four bits; `same_as`: for each the first with its address, or () for any;
            `twin_of`: an earlier tensor that it must be itself, or -1.
        check: whether tensors, but for those with twins, are as those of the recording.
        circumstances: functions and what they must return.
        empty: makes a tensor of a shape, strides and a dtype; `outputs`, `scratch`: what of.
        offsets: of tensors in the scratch; `raw`: functions that take memory, (size, stream), and give it back, for scratch
            that needs no tensor, or None twice.
        result: None, the number of an argument (from 0 on) or an output (from -1 down), or a tuple of such.
        kernels: what has to stay loaded.
    """
    module, driver = native(), entry_points()
    if module is None or driver is None:
        return None
    n_args = len(tensors) + len(options) - len(names)
    entries = driver.launch, driver.context, driver.message
    words = [array("q", numbers).tobytes() for numbers in (tensors, alignment, same_as, twin_of, offsets, entries)]
    frozen = tuple([list(option) if type(option) is list else option for option in options])
    state = (
        n_args, names, frozen, *words[:4], check, tuple(circumstances), empty, tuple(outputs), scratch, words[4], stream_of,
        device, *issue, words[5], result, tuple(kernels), *raw,
    )  # fmt: skip
    try:
        return module.Replay(state)
    except ValueError:  # larger than anything here
        return None


def _packed(type_: str, argument: Any) -> bytes | None:
    """As Triton's launcher hands it to the driver."""
    code = "Q" if type_.startswith("*") else _CODES.get(type_)
    if code is None:
        return None
    try:
        return struct.pack(code, 0 if argument is None else argument)
    except (struct.error, OverflowError):  # for the launcher to refuse
        return None
