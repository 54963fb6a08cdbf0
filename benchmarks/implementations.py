"""How each implementation of an operator is compiled, called, waited for and reset on operands of its own framework."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from parity_tests.cases import Case
from ssm_configs import override
from ssm_configs.spec import Knobs

from .op import BenchOp, Storage, Tensors, draw
from .peers import Peer
from .timing import Call, synchronize


class Operands(Protocol):
    """The arguments of one case in one framework; implementations of that framework share them and take turns."""

    def reset(self) -> None:
        """Back to the initial values, with the results of earlier calls poisoned where that can be done."""
        ...

    def results(self) -> dict[str, torch.Tensor]:
        """y and the states after the last call; valid until the next one."""
        ...


class Implementation(Protocol):
    name: str
    framework: str
    slack: float
    """How many tolerances it may be off by."""

    def takes(self, case: Case) -> bool:
        """Whether the case is one of its own."""
        ...

    def compiled_case(self, op: BenchOp, case: Case) -> Case:
        """The case to compile for this one; cases that map to the same share what `compile` returns."""
        ...

    def compile(self, op: BenchOp, case: Case, knobs: Knobs | None) -> Any:
        """Whatever can be done ahead of the first timed call. Thread-safe. `knobs=None`: as the tables say."""
        ...

    def bind(self, op: BenchOp, operands: Any, compiled: Any, knobs: Knobs | None) -> Call: ...


class TorchOperands:
    def __init__(self, op: BenchOp, case: Case, initial: Tensors, storage: Storage):
        self._op, self._initial = op, {name: initial[name] for name in op.mutated_in(initial)}
        self.scalars = op.scalars(case)
        self.tensors = dict(initial)
        for name, tensor in self._initial.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.tensors[name] = storage.take(f"{name}, mutable", tuple(tensor.shape), dtype)
        self.out = None if op.output is None else torch.empty_like(initial[op.output])
        self.returned: Any = self.out
        """What the last call gave: y, (y, states …), its results by name, or None where no call was and none has a buffer."""
        self.reset()

    def reset(self) -> None:
        # First, for what a call returned may be an operand. The next one is likely to be given the same memory.
        for tensor in self.results().values() if self.returned is not self.out else ():
            tensor.fill_(float("nan"))
        self.returned = None if self.out is None else self.out.fill_(float("nan"))
        for name, tensor in self._initial.items():
            self.tensors[name].copy_(tensor)

    def results(self) -> dict[str, torch.Tensor]:
        if isinstance(self.returned, Mapping):
            return dict(self.returned)
        y, *after = self.returned if isinstance(self.returned, tuple) else (self.returned,)
        # A state that must be updated in place is looked for there, whatever was returned.
        states = {name: self.tensors[name] for name in self._initial} or zip(self._op.fresh, after, strict=True)
        return {self._op.result: y, **dict(states)}


class _TorchImplementation:
    """Shared by our Triton twin and the peers: `_function` gives the call on some operands."""

    name: str
    framework = "torch"
    slack = 1.0

    def __init__(self, device: torch.device):
        self._device = device

    def takes(self, case: Case) -> bool:
        return True

    def compiled_case(self, op: BenchOp, case: Case) -> Case:
        return op.single(case)

    def compile(self, op: BenchOp, case: Case, knobs: Knobs | None) -> None:
        """A call on small operands; Triton keeps what it compiled."""
        storage = Storage(self._device)
        operands = TorchOperands(op, case, draw(op, case, storage), storage)
        self.bind(op, operands, None, knobs).issue()
        synchronize()

    def bind(self, op: BenchOp, operands: TorchOperands, compiled: None, knobs: Knobs | None) -> Call:
        call = self._function(op, operands)

        def issue() -> None:
            with _pinned(op, "triton", knobs):
                operands.returned = call()

        return Call(self.name, self.framework, issue, synchronize)

    def _function(self, op: BenchOp, operands: TorchOperands) -> Callable[[], Any]:
        raise NotImplementedError


class TritonTwin(_TorchImplementation):
    name = "triton"

    def compile(self, op: BenchOp, case: Case, knobs: Knobs | None) -> None:
        import triton.knobs

        if not triton.knobs.runtime.interpret:  # the interpreter compiles nothing, and stands one thread only
            super().compile(op, case, knobs)

    def _function(self, op: BenchOp, operands: TorchOperands) -> Callable[[], Any]:
        import triton_ssm

        named = {name: tensor for name, tensor in operands.tensors.items() if name not in op.positional}
        positional = [operands.tensors[name] for name in op.positional]
        buffer = {} if operands.out is None else {"out": operands.out}
        return functools.partial(op.function(triton_ssm), *positional, **named, **operands.scalars, **buffer)


class PeerImplementation(_TorchImplementation):
    """It picks its own configs."""

    def __init__(self, device: torch.device, peer: Peer, function: Callable[..., Any]):
        super().__init__(device)
        self.name, self.slack = peer.implementation, peer.slack
        self._peer, self._peer_function = peer, function

    def takes(self, case: Case) -> bool:
        return self._peer.takes(case)

    def compile(self, op: BenchOp, case: Case, knobs: Knobs | None) -> None:
        # An autotuner times in its first call: that one must be of the size that is measured, and alone on the device.
        if not self._peer.autotunes:
            super().compile(op, case, knobs)

    def _function(self, op: BenchOp, operands: TorchOperands) -> Callable[[], Any]:
        operands.reset()  # the adapter may bring the state into a layout of its own
        return self._peer.adapt(self._peer_function, operands.tensors, operands.out, **operands.scalars)


class JaxOperands:
    """JAX's own copies: a buffer that came in through DLPack belongs to torch and could not be donated."""

    def __init__(self, op: BenchOp, initial: Tensors):
        self._initial = {name: initial[name] for name in op.mutated_in(initial)}
        self._names = (op.result, *op.after_y(initial))
        # in the order of the operands, which is that of the compiled program's arguments
        self.arrays = {name: None if name in self._initial else _to_jax(tensor) for name, tensor in initial.items()}
        self._returned: tuple[Any, ...] = ()
        self.reset()

    def reset(self) -> None:
        self._returned = ()
        for name in self._initial:
            self.arrays[name] = None  # freed before its successor is allocated
        for name, tensor in self._initial.items():
            self.arrays[name] = _to_jax(tensor)

    def keep(self, returned: Any) -> None:
        """Takes what a call returned; its states are the operands of the next one."""
        self._returned = returned if isinstance(returned, tuple) else (returned,)
        for name, array in zip(self._names[1:], self._returned[1:], strict=True):
            if name in self._initial:
                self.arrays[name] = array

    def results(self) -> dict[str, torch.Tensor]:
        arrays = zip(self._names, self._returned, strict=True)
        return {name: torch.from_dlpack(array) for name, array in arrays}

    def wait(self) -> None:
        import jax

        jax.block_until_ready(self._returned)


class _JaxImplementation:
    """Shared by our Pallas twin and the peers: `_function` takes the operands by name. Its state is donated and handed from
    call to call, as a model would."""

    name: str
    framework = "jax"
    slack = 1.0

    def takes(self, case: Case) -> bool:
        return True

    def compiled_case(self, op: BenchOp, case: Case) -> Case:
        return case  # shapes are static

    def jitted(self, op: BenchOp, case: Case) -> Any:
        """Of the operands, in their order."""
        import jax

        names = tuple(op.operands(case))
        function = self._function(op, case)

        def call(*arrays: Any) -> Any:
            return function(**dict(zip(names, arrays, strict=True)))

        return jax.jit(call, donate_argnums=[names.index(name) for name in op.mutated_in(names)])

    def compile(self, op: BenchOp, case: Case, knobs: Knobs | None) -> Any:
        """The compiled program."""
        import jax

        operands = op.operands(case).values()
        shapes = [jax.ShapeDtypeStruct(operand.shape, jax.numpy.dtype(operand.dtype)) for operand in operands]
        jitted = self.jitted(op, case)  # which may import the package: not under an override
        with _pinned(op, "pallas", knobs):
            return jitted.lower(*shapes).compile()

    def bind(self, op: BenchOp, operands: JaxOperands, compiled: Any, knobs: Knobs | None) -> Call:
        names, arrays = tuple(operands.arrays), operands.arrays

        def issue() -> None:
            operands.keep(compiled(*(arrays[name] for name in names)))

        return Call(self.name, self.framework, issue, operands.wait)

    def _function(self, op: BenchOp, case: Case) -> Callable[..., Any]:
        raise NotImplementedError


class JaxTwin(_JaxImplementation):
    def __init__(self, implementation: str):
        self.name = implementation

    def _function(self, op: BenchOp, case: Case) -> Callable[..., Any]:
        import pallas_ssm

        function = op.function(pallas_ssm)

        def call(**named: Any) -> Any:
            positional = [named.pop(name) for name in op.positional]
            return function(*positional, **named, **op.scalars(case), implementation=self.name)

        return call


class JaxPeerImplementation(_JaxImplementation):
    def __init__(self, peer: Peer, function: Callable[..., Any]):
        self.name, self.slack = peer.implementation, peer.slack
        self._peer, self._peer_function = peer, function

    def takes(self, case: Case) -> bool:
        return self._peer.takes(case)

    def _function(self, op: BenchOp, case: Case) -> Callable[..., Any]:
        return lambda **named: self._peer.adapt(self._peer_function, named, **op.scalars(case))


def of_peer(device: torch.device, peer: Peer, function: Callable[..., Any]) -> Implementation:
    if peer.framework == "jax":
        return JaxPeerImplementation(peer, function)
    return PeerImplementation(device, peer, function)


OWN: dict[str, Callable[[torch.device], Implementation]] = {
    "triton": TritonTwin,
    "mosaic_gpu": lambda device: JaxTwin("mosaic_gpu"),
    "xla": lambda device: JaxTwin("xla"),
}
"""The implementations of this repository, by the name they have in results."""


def _pinned(op: BenchOp, twin: str, knobs: Mapping[str, Any] | None) -> AbstractContextManager[None]:
    return override(op.name, twin=twin, **knobs) if knobs else contextlib.nullcontext()


def _to_jax(tensor: torch.Tensor) -> Any:
    import jax
    import jax.numpy as jnp

    synchronize()  # the two frameworks know nothing of each other's streams
    return jax.block_until_ready(jnp.array(jax.dlpack.from_dlpack(tensor), copy=True))
