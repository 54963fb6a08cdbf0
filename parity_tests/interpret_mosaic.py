"""Runs Mosaic GPU kernels on the CPU, in JAX's interpreter, with its race detector on. Tests only.

Only what is traced inside the context is interpreted. The interpreter does not see layouts, nor the order in which blocks
would run; those are the compile gates' and the GPU's to test.

Four things that the compiler takes are missing from jax 0.11's interpreter, and are added here: wgmma with its left operand
in registers, a value stored to an accumulator, loads and stores of a part of memory under another shape, and one tile of shared
memory under two layouts (a `RefUnion` of members of one shape and dtype), which TMA and wgmma see as the same bytes.

Two of its ways are replaced: callbacks go without the detour over JAX's arrays, and races are those of every kernel that ran,
not of the last one alone.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import callback, state
from jax._src.pallas.mosaic_gpu import core, primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax._src.state import primitives as state_primitives
from jax._src.state.types import ReshapeTransform
from jax.experimental.pallas import mosaic_gpu as plgpu

# A warpgroup that waits on a barrier holds one of the CPU client's threads, of which there are as many as cores: with fewer
# than warpgroups the others never run. Read when JAX's CPU backend starts.
os.environ.setdefault("NPROC", "16")


class RaceError(AssertionError):
    """The interpreter saw two accesses that nothing orders."""


@gpu_callbacks.fail_on_exception
def _add_product(*, token, mesh_location, thread, acc_key, acc_transforms, a, b_key, b_transforms, source_info=None):
    """acc += a @ b with a as a value: the interpreter's own, which reads all three from buffers, otherwise."""
    memory = gpu_callbacks._get_shared_memory()
    where = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)
    keys = [shared_memory.HostAllocationKey.from_array(key) for key in (acc_key, b_key)]
    ranges = [
        memory.access(key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms)))
        for key, transforms in zip(keys, (acc_transforms, b_transforms), strict=True)
    ]
    acc, b = (
        memory.get_buffer_content(key, at, thread, logging_info=where)[0] for key, at in zip(keys, ranges, strict=True)
    )
    if acc is None or b is None:
        raise IndexError("an operand of wgmma lies outside its buffer")
    product = np.matmul(np.asarray(a), b, dtype=acc.dtype)
    memory.store_buffer_content(keys[0], ranges[0], acc + product, thread, logging_info=where)
    return token


_wgmma_of_refs = jaxpr_interpret.JaxprInterpreter._interpret_wgmma_ref_p


def _wgmma(self: Any, eqn: Any, token: Any, get_invals: Any) -> Any:
    if isinstance(eqn.invars[1].aval, state.AbstractRef):
        return _wgmma_of_refs(self, eqn, token, get_invals)
    acc, a, b, *leaves = get_invals()
    trees = [eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([]) for name in ("acc", "a", "b")]
    acc_transforms, _, b_transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    acc, acc_transforms = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, acc, acc_transforms)
    b, b_transforms = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, b_transforms)
    result = callback.io_callback(
        functools.partial(_add_product, source_info=eqn.source_info),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        acc_key=acc,
        acc_transforms=acc_transforms,
        a=a,
        b_key=b,
        b_transforms=b_transforms,
    )
    return result, []


@gpu_callbacks.fail_on_exception
def _set_accumulator(*, token, mesh_location, thread, acc_key, value, source_info=None):
    """Like the interpreter's other accesses to accumulators, not one for the race detector: no other thread has it."""
    memory = gpu_callbacks._get_shared_memory()
    where = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)
    key = shared_memory.HostAllocationKey.from_array(acc_key)
    memory.store_buffer_content(key, memory.access(key, ()), np.array(value), thread, logging_info=where)
    return token


_swap_of_memory = jaxpr_interpret.JaxprInterpreter._interpret_swap_p


def _swap(self: Any, eqn: Any, token: Any, get_invals: Any) -> Any:
    if not isinstance(eqn.invars[0].aval, core.WGMMAAbstractAccumulatorRef):
        return _swap_of_memory(self, eqn, token, get_invals)
    acc, value, *_ = get_invals()
    token = callback.io_callback(
        functools.partial(_set_accumulator, source_info=eqn.source_info),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        acc_key=acc,
        value=value,
    )
    return token, value  # nobody reads what was there


_get_as_is, _swap_as_is = gpu_callbacks._get, gpu_callbacks._swap


def _without_reshape(transforms: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[int, ...] | None]:
    if transforms and isinstance(transforms[-1], ReshapeTransform):
        return transforms[:-1], transforms[-1].shape
    return transforms, None


def _get_reshaped(token: Any, location: Any, thread: Any, key: Any, transforms: Any, *more: Any, **options: Any) -> Any:
    transforms, shape = _without_reshape(transforms)
    token, got = _get_as_is(token, location, thread, key, transforms, *more, **options)
    return token, got if shape is None else got.reshape(shape)


def _swap_reshaped(
    token: Any, location: Any, thread: Any, key: Any, transforms: Any, value: Any, *more: Any, **options: Any
) -> Any:
    transforms, shape = _without_reshape(transforms)
    if shape is not None:
        at = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        own = shared_memory.HostAllocationKey.from_array(key)
        value = np.asarray(value).reshape(gpu_callbacks._get_shared_memory().access(own, at).shape)
    token, was = _swap_as_is(token, location, thread, key, transforms, value, *more, **options)
    return token, was if shape is None else was.reshape(shape)


_member_of_union = jaxpr_interpret.resolve_ref


def _resolve_ref(aval: Any, key: Any, transforms: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """A union's members have a buffer each; where all look the same, everybody uses the first."""
    if isinstance(aval, core.AbstractRefUnion):
        members = [jaxpr_interpret._member_inner_aval(member) for member in jaxpr_interpret.union_members(aval)]
        if len({(member.shape, member.dtype) for member in members}) == 1:
            return key[0], tuple(transforms[1:])
    return _member_of_union(aval, key, transforms)


gpu_callbacks._get, gpu_callbacks._swap = _get_reshaped, _swap_reshaped
jaxpr_interpret.resolve_ref = _resolve_ref
jaxpr_interpret.JaxprInterpreter._interpret_wgmma_ref_p = _wgmma
jaxpr_interpret.JaxprInterpreter._interpret_swap_p = _swap


@contextlib.contextmanager
def _accumulators_as_buffers() -> Iterator[None]:
    """A store to an accumulator is traced as one to any buffer, which the interpreter knows."""
    store = primitives.wgmma_accumulator_store
    primitives.wgmma_accumulator_store = lambda acc, value: state_primitives.ref_set(acc, (...,), value)
    try:
        yield
    finally:
        primitives.wgmma_accumulator_store = store


def _scalar(x: Any, own: Any = shared_memory._to_int) -> Any:
    return int(x) if isinstance(x, np.integer) else own(x)


shared_memory._to_int = _scalar


def _call_with_numpy(*args: Any, callback: Any, **_: Any) -> list[np.ndarray]:
    # Copies, for a buffer may keep them; and scalars as scalars, which places of threads are made of.
    return [np.asarray(result) for result in callback(*(np.array(arg)[()] for arg in args))]


@contextlib.contextmanager
def _callbacks_on_numpy() -> Iterator[None]:
    """Callbacks get NumPy's arrays, which are what the interpreter works with. JAX would put each on a device first, and that
    takes a third of a kernel's time."""
    implementation = callback.io_callback_impl
    callback.io_callback_impl = _call_with_numpy
    try:
        yield
    finally:
        callback.io_callback_impl = implementation


@contextlib.contextmanager
def _races_of_all_kernels() -> Iterator[list[Any]]:
    """The interpreter itself keeps only what it saw of the last kernel that ran."""
    callbacks: Any = gpu_callbacks
    state, seen = callbacks.GPURaceDetectionState, []

    def remembered(**arguments: Any) -> Any:
        seen.append(state(**arguments))
        return seen[-1]

    callbacks.GPURaceDetectionState = remembered
    try:
        yield seen
    finally:
        callbacks.GPURaceDetectionState = state


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels run interpreted inside; a race is a `RaceError` on the way out."""
    interpreter.reset_gpu_interpret_mode_state()  # a kernel that failed leaves the next one a broken state
    try:
        # Memory that nobody wrote reads as NaN, so an element of an output that a kernel forgets is seen.
        params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
        with _races_of_all_kernels() as seen, _callbacks_on_numpy():
            with plgpu.force_gpu_interpret_mode(params), _accumulators_as_buffers():
                yield
                jax.effects_barrier()
        if any(races.races_found for races in seen):
            raise RaceError("the interpreter found a race; its log says where")
    finally:
        interpreter.reset_gpu_interpret_mode_state()
