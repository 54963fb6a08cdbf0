"""One differentiable function over both implementations; its backward pass is that of the XLA scan."""

from functools import partial
from typing import Any

import jax
from jax.custom_batching import custom_vmap

from . import _selective_state_update_kernel as kernel
from . import _selective_state_update_xla as xla
from ._selective_state_update_call import Floats, Integers, Static, with_heads
from ._selective_state_update_dispatch import Prepared
from ._selective_state_update_launch import OP, Launch, Unsupported

Result = tuple[jax.Array, jax.Array]


def call(prepared: Prepared, launch: Launch | None, batched_by_xla: bool) -> Result:
    static = prepared.static
    floats, integers = prepared.operands()
    if static.dims.headless:
        floats = with_heads(floats)
    result: Any = _run(static, launch, batched_by_xla, floats, integers)
    y, state = result
    return (y[:, 0], state[:, 0]) if static.dims.headless else (y, state)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(static: Static, launch: Launch | None, batched_by_xla: bool, floats: Floats, integers: Integers) -> Result:
    if launch is None:
        return xla.forward(static, floats, integers)
    run = custom_vmap(partial(kernel.run, static, launch))
    run.def_vmap(partial(_batched, static, batched_by_xla))
    return run(floats, integers)


def _batched(
    static: Static,
    by_xla: bool,
    axis_size: int,
    in_batched: tuple[Floats, Integers],
    floats: Floats,
    integers: Integers,
) -> tuple[Result, tuple[bool, bool]]:
    """What `jax.vmap` makes of the kernel."""
    if not by_xla:
        raise Unsupported(
            f"{OP}: the mosaic_gpu kernel is not batched by jax.vmap; give the batch its own sequences and slots, or use "
            "implementation='xla' or None"
        )
    axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
    batched = jax.vmap(partial(xla.forward, static), in_axes=axes, axis_size=axis_size)(floats, integers)
    return batched, (True, True)


def _forward(static: Static, launch: Launch | None, batched_by_xla: bool, floats: Floats, integers: Integers):
    return _run(static, launch, batched_by_xla, floats, integers), (floats, integers)


def _backward(static: Static, launch: Launch | None, batched_by_xla: bool, residuals, cotangents):
    floats, integers = residuals
    _, pullback = jax.vjp(lambda floats: xla.differentiable(static, floats, integers), floats)
    return (*pullback(cotangents), None)


_run.defvjp(_forward, _backward)
