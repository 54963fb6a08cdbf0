"""One function over both implementations; the kernels' backward pass is that of the XLA form."""

from functools import partial
from typing import Any

import jax
from jax.custom_batching import custom_vmap

from . import _causal_conv1d_kernel, _causal_conv1d_update_kernel
from . import _causal_conv1d_xla as xla
from ._causal_conv1d_call import Floats, Integers, Static
from ._causal_conv1d_launch import UPDATE, Launch, Unsupported


def call(static: Static, launch: Launch | None, batched_by_xla: bool, floats: Floats, integers: Integers) -> Any:
    """((part of y, …), final state), or, of an update, (y, new pool). `launch`: None for XLA."""
    if launch is None:
        return _by_xla(static)(floats, integers)
    return _run(static, launch, batched_by_xla, floats, integers)


def _by_xla(static: Static) -> Any:
    return partial(xla.update if static.op == UPDATE else xla.prefill, static)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(static: Static, launch: Launch, batched_by_xla: bool, floats: Floats, integers: Integers) -> Any:
    kernel = _causal_conv1d_update_kernel if static.op == UPDATE else _causal_conv1d_kernel
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
) -> Any:
    """What `jax.vmap` makes of the kernel."""
    if not by_xla:
        raise Unsupported(
            f"{static.op}: the mosaic_gpu kernel is not batched by jax.vmap; give the batch its own sequences and slots, "
            "or use implementation='xla' or None"
        )
    axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
    batched = jax.vmap(_by_xla(static), in_axes=axes, axis_size=axis_size)(floats, integers)
    return batched, jax.tree.map(lambda _: True, batched)


def _forward(static: Static, launch: Launch, batched_by_xla: bool, floats: Floats, integers: Integers) -> Any:
    return _run(static, launch, batched_by_xla, floats, integers), (floats, integers)


def _backward(static: Static, launch: Launch, batched_by_xla: bool, residuals: Any, cotangents: Any) -> Any:
    floats, integers = residuals
    _, pullback = jax.vjp(lambda floats: _by_xla(static)(floats, integers), floats)
    return (*pullback(cotangents), None)


_run.defvjp(_forward, _backward)
