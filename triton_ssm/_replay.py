"""Calls that repeat an earlier one: its launches again, with other pointers, and no other Python.

What an operator launches follows from its arguments' shapes, strides, dtypes, devices and 16-byte alignment, from its options,
and from what a look-up goes by: never from what tensors hold, for nothing here waits for a GPU. So a call that was seen before
is recorded (`_recording.py`), and from the third on only outputs are allocated and kernels launched: in C (`_native.py`) with 2
to 4 us beside CUDA's part, or else in Python with 4 to 13, where the operators' own and Triton's took 15 to 100.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from triton import knobs

from ssm_configs import circumstances
from ssm_configs.environment import reader

from . import _native
from ._arguments import is_memory as _is_memory
from ._plans import Cache
from ._recording import Program, Recorder

SERVED = ("cuda",)  # devices
_RECENT = 4  # kinds that one operator's calls are compared to before they are looked up
_SEEN = object()
# Dynamo's guards compare all tensors in one call into C++. Where a torch has none, the keys below are all there is.
_Guards: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
_switches = reader("FLA_USE_TMA")  # what operators read of the environment themselves


def replayed[**P, R](operator_: Callable[P, R]) -> Callable[P, R]:
    """An operator whose launches are repeated for calls of one kind. See above for what it may depend on."""
    kinds: Cache[Any] = Cache()
    latest: _Kind | None = None
    recent: tuple[Any, ...] = ()

    @functools.wraps(operator_)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal latest, recent
        if _is_watched():
            return operator_(*args, **kwargs)
        for native in recent:
            result = native.attempt(args, kwargs)
            if result is not NotImplemented:
                return result
        values, names = (*args, *kwargs.values()), tuple(kwargs)
        around = tuple([now() for now in _AROUND])

        kind = latest
        if kind is not None and kind.guards is not None and kind.form == (len(values), names) and kind.around == around:
            tensors = kind.tensors_of(values)
            if kind.are_alike(tensors) and _frozen(kind.options_of(values)) == kind.options:
                pointers = [tensor.data_ptr() for tensor in tensors]
                if [pointer & 15 for pointer in pointers] == kind.alignment and kind.is_shared_alike(pointers):
                    return operator_(*args, **kwargs) if kind.program is None else kind.program(values, pointers)

        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if not all([_is_memory(tensor) and tensor.device.type in SERVED for tensor in tensors]):
            return operator_(*args, **kwargs)
        pointers = [tensor.data_ptr() for tensor in tensors]
        alignment = [pointer & 15 for pointer in pointers]
        key = (names, around, tuple(alignment), _shared(pointers), *_described(values))
        kind = kinds.get(key)
        if isinstance(kind, _Kind):
            latest = kind
            if kind.native is not None:
                recent = (kind.native, *[other for other in recent if other is not kind.native])[:_RECENT]
            return operator_(*args, **kwargs) if kind.program is None else kind.program(values, pointers)
        ready = _native.is_ready()
        if kind is None or not ready:  # many a shape of a prompt is seen once
            result = operator_(*args, **kwargs)
            kinds[key] = _SEEN
            return result
        with Recorder(values) as recorder:
            result = operator_(*args, **kwargs)
        kind = latest = kinds[key] = _Kind(
            values, names, around, alignment, _shared(pointers), recorder.program(result)
        )
        if kind.native is not None:
            recent = (kind.native, *recent)[:_RECENT]
        return result

    _leave_alone(call)
    return call


def _leave_alone(function: Any) -> None:
    """`torch.compile` breaks its graph at a call, which then runs as it is. As `torch.compiler.disable` has it, without that
    one's import of Dynamo and without its time in every call.

    Dynamo would break it at every look-up and launch anyway, and guard on addresses; the interpreter does not survive it.
    """
    function._torchdynamo_disable = True
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))  # and all that it calls


_AROUND = (torch.is_grad_enabled, torch.is_inference_mode_enabled, circumstances, _switches)


class _Kind:
    """Calls that come to the same launches."""

    def __init__(
        self, values: tuple, names: tuple[str, ...], around: tuple, alignment: list[int], shared: tuple[int, ...],
        program: Program | None,
    ) -> None:  # fmt: skip
        where = [isinstance(value, torch.Tensor) for value in values]
        self.form = (len(values), names)
        self.around = around
        self.tensors_of = _picker([index for index, tensor in enumerate(where) if tensor])
        self.options_of = _picker([index for index, tensor in enumerate(where) if not tensor])
        self.options = _frozen(self.options_of(values))
        self.alignment = alignment
        self._shared = shared
        self.program = program  # None: the operator itself is called, every time
        tensors = self.tensors_of(values)
        self._twin_of = [_first(tensors, tensor, index) for index, tensor in enumerate(tensors)]
        self.guards: Any = None
        if _Guards is not None:
            distinct = [tensor for tensor, twin in zip(tensors, self._twin_of, strict=True) if twin < 0]
            self.guards = _Guards(  # which refuse one tensor in two places
                *distinct,
                dynamic_dims_sizes=[list(tensor.shape) for tensor in distinct],
                dynamic_dims_strides=[list(tensor.stride()) for tensor in distinct],
            )
        self.native = None if program is None or self.guards is None else self._natively(values, program)

    def _natively(self, values: tuple, program: Program) -> Any:
        if program.issue is None:
            return None
        return _native.replay(
            names=self.form[1],
            options=self.options_of(values),
            tensors=[index for index, value in enumerate(values) if isinstance(value, torch.Tensor)],
            alignment=self.alignment,
            same_as=self._shared,
            twin_of=self._twin_of,
            check=self.guards.check,
            circumstances=[*zip(_AROUND, self.around, strict=True), (program.current_device, program.device.index)],
            empty=program.empty,
            outputs=program.outputs,
            scratch=program.scratch,
            offsets=program.offsets,
            raw=program.raw,
            stream_of=program.stream_of,
            device=program.device.index,
            issue=program.issue,
            result=program.result,
            kernels=program.kernels,
        )

    def are_alike(self, tensors: Sequence[torch.Tensor]) -> bool:
        distinct = []
        for tensor, twin in zip(tensors, self._twin_of, strict=True):
            if twin < 0:
                distinct.append(tensor)
            elif tensor is not tensors[twin]:
                return False
        return self.guards.check(*distinct)

    def is_shared_alike(self, pointers: list[int]) -> bool:
        # Tensors apart in the recording may be one tensor now; each has a place of its own.
        return not self._shared or _shared(pointers) == self._shared


def _first(tensors: Sequence[torch.Tensor], tensor: torch.Tensor, before: int) -> int:
    """Where an earlier one is the same object, or -1."""
    return next((index for index in range(before) if tensors[index] is tensor), -1)


def _shared(pointers: list[int]) -> tuple[int, ...]:
    """Which tensors begin at one address: for each the first of them, or () where there are none."""
    return () if len(set(pointers)) == len(pointers) else tuple([pointers.index(pointer) for pointer in pointers])


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple]:
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda values: tuple([values[index] for index in indices])


def _frozen(options: Sequence[Any]) -> list[Any]:
    """With their types: 1 equals True, and only one of them is a bool. A list may change after the call."""
    return [
        (type(option), option)
        if type(option) is not tuple and type(option) is not list
        else (type(option), *[(type(entry), entry) for entry in option])
        for option in options
    ]


def _described(values: tuple) -> list[Any]:
    """All that may be told of a call's arguments without looking at what tensors hold."""
    return [
        (type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
        if isinstance(value, torch.Tensor)
        else _frozen((value,))[0]
        for value in values
    ]


def _is_watched() -> bool:
    """Hooks want to see every launch, modes every allocation, and a recording, which is a mode, both. And tangents of forward
    differentiation, which nothing else tells of, are for the operator to refuse."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Triton's chains of hooks are empty unless a profiler is attached; before it had chains there was a hook or None.
    if (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True)):
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0
