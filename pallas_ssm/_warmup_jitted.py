"""`jitted`: the operators as jitted functions, which call programs that a warm-up made ready and else trace like `jax.jit`."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src.array import ArrayImpl
from jax._src.config import trace_context
from jax._src.core import trace_state_clean
from jax.sharding import SingleDeviceSharding

from .causal_conv1d import causal_conv1d, causal_conv1d_split
from .causal_conv1d_update import causal_conv1d_update
from .gdn import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from .selective_state_update import selective_state_update
from .ssd import mamba_chunk_scan_combined

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d": causal_conv1d,
    "causal_conv1d_split": causal_conv1d_split,
    "causal_conv1d_update": causal_conv1d_update,
    "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
    "selective_state_update": selective_state_update,
    "chunk_gated_delta_rule": chunk_gated_delta_rule,
    "fused_recurrent_gated_delta_rule": fused_recurrent_gated_delta_rule,
}
# Pools that an operator returns anew.
_DONATED = {
    "causal_conv1d": ("conv_state",),
    "causal_conv1d_split": ("conv_state",),
    "causal_conv1d_update": ("conv_state",),
    "selective_state_update": ("state",),
    "fused_recurrent_gated_delta_rule": ("state",),
}

Options = tuple[tuple[str, Any], ...]


def jitted(op: str, **options: Any) -> "Jitted":
    """`op` under `jax.jit`, the same function for the same options, which are all its arguments that are no arrays.

    Call it by keyword, which is quickest. It donates the pool that the operator returns anew. `warmup` compiles these.
    """
    if not isinstance(op, str) or op not in _FUNCTIONS:
        raise ValueError(f"op: expected one of {tuple(_FUNCTIONS)}, got {op!r}")
    for name, value in options.items():
        try:
            hash(value)
        except TypeError:
            raise TypeError(f"{name}: expected a hashable option, got {type(value).__name__}") from None
    return _jitted(op, tuple(sorted(options.items())))


class Place(NamedTuple):
    """Where a program may be called: `jax.config` as it was when it was made, and its device."""

    context: Any
    sharding: SingleDeviceSharding


def place(device: Any) -> Place:
    """The caller's."""
    return Place(trace_context(), SingleDeviceSharding(device))


class _Form:
    """One set of arguments. JAX's quick dispatch is for positional ones, so they have a fixed order."""

    def __init__(self, op: str, options: Options, names: tuple[str, ...]) -> None:
        self.names = names
        self._op, self._options = op, options
        self.jit = self.fresh()

    def fresh(self) -> Any:
        """A function that has never been traced: what it compiles follows the tables as they are now."""
        function = functools.partial(_FUNCTIONS[self._op], **dict(self._options))
        names = self.names

        def call(*arrays: Any) -> Any:
            return function(**dict(zip(names, arrays, strict=True)))

        functools.update_wrapper(call, _FUNCTIONS[self._op])  # JAX names programs by it, and arguments by the signature
        del call.__wrapped__
        kind = inspect.Parameter.POSITIONAL_ONLY
        call.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        return jax.jit(call, donate_argnums=[names.index(name) for name in donated(self._op, names)])


class Jitted:
    """An operator with its options: one jitted function for each set of arguments, and the programs made ready for them.

    A program made ready takes arrays (also NumPy's) of its shapes and dtypes, uncommitted or committed to its device, outside
    of every trace and under the `jax.config` that it was made under. All else goes to `jax.jit`.
    """

    def __init__(self, op: str, options: Options) -> None:
        functools.update_wrapper(self, _FUNCTIONS[op])
        self.op, self.options = op, options
        self._forms: dict[tuple[str, ...], _Form] = {}
        self._lock = threading.Lock()
        self._ready: tuple[Place, dict[tuple[Any, ...] | None, Callable[..., Any]]] | None = None
        self._made: dict[tuple[Any, ...], str] = {}

    def __call__(self, *positional: Any, **arrays: Any) -> Any:
        if positional:
            arrays = self._named(positional, arrays)
        names = tuple(arrays)
        form = self._forms.get(names) or self._form(names)
        values = [arrays[name] for name in form.names]
        ready = self._ready
        if ready is not None and trace_context() == ready[0].context and trace_state_clean():
            program = ready[1].get(_signature(form, values, ready[0].sharding))
            if program is not None:
                return program(*values)
        return form.jit(*values)

    def lower(self, *positional: Any, **shapes: Any) -> jax.stages.Lowered:
        return self.trace(*positional, **shapes).lower()

    def trace(self, *positional: Any, **shapes: Any) -> jax.stages.Traced:
        shapes = self._named(positional, shapes)
        form = self._form(tuple(shapes))
        return form.jit.trace(*(shapes[name] for name in form.names))

    def eval_shape(self, *positional: Any, **shapes: Any) -> Any:
        shapes = self._named(positional, shapes)
        form = self._form(tuple(shapes))
        return form.jit.eval_shape(*(shapes[name] for name in form.names))

    def lower_anew(self, shapes: Mapping[str, Any]) -> jax.stages.Lowered:
        """`lower` without what earlier traces left, for a program to `keep`."""
        form = self._form(tuple(shapes))
        return form.fresh().lower(*(shapes[name] for name in form.names))

    def keep(self, shapes: Mapping[str, Any], where: Place, made_from: str, program: Callable[..., Any]) -> None:
        """Calls with these shapes go to `program`, which takes them in the order of their names."""
        key = self._key(shapes)
        with self._lock:
            # Programs of one place: a warm-up elsewhere takes the place of the earlier one, whose calls `jax.jit` serves.
            if self._ready is None or self._ready[0] != where:
                self._ready, self._made = (where, {}), {}
            self._ready[1][key] = program
            self._made[key] = made_from

    def keeps(self, shapes: Mapping[str, Any], where: Place, made_from: str) -> bool:
        """Whether it has that program already."""
        with self._lock:
            here = self._ready is not None and self._ready[0] == where
            return here and self._made.get(self._key(shapes)) == made_from

    def _named(self, positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        return dict(inspect.signature(_FUNCTIONS[self.op]).bind_partial(*positional, **named).arguments)

    def _key(self, shapes: Mapping[str, Any]) -> tuple[Any, ...]:
        form = self._form(tuple(shapes))
        key: list[Any] = [form]
        for name in form.names:
            key += tuple(shapes[name].shape), np.dtype(shapes[name].dtype)
        return tuple(key)

    def _form(self, names: tuple[str, ...]) -> _Form:
        if names not in self._forms:
            ordered = tuple(sorted(names))
            form = self._forms.setdefault(ordered, _Form(self.op, self.options, ordered))
            self._forms[names] = form
        return self._forms[names]


def donated(op: str, names: Iterable[str]) -> tuple[str, ...]:
    """Which of the arguments `names` a jitted `op` donates."""
    return tuple(name for name in names if name in _DONATED.get(op, ()))


def _signature(form: _Form, values: list[Any], sharding: SingleDeviceSharding) -> tuple[Any, ...] | None:
    """What `keep` files programs under, or None where none would do."""
    key: list[Any] = [form]
    for value in values:
        kind = type(value)
        if kind is ArrayImpl:
            # A weak type promotes in another way; a program compiled ahead would not notice.
            if value.weak_type or (value.committed and value.sharding != sharding):
                return None
        elif kind is not np.ndarray:
            return None
        key += value.shape, value.dtype
    return tuple(key)


@functools.cache
def _jitted(op: str, options: Options) -> Jitted:
    return Jitted(op, options)
