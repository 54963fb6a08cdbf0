"""One function over both implementations; the kernels' backward pass is that of the XLA form."""

from functools import partial
from typing import Any

import jax
from jax.custom_batching import custom_vmap

from .._selective_state_update_launch import Unsupported
from . import _call, _combined_call, _fused, _staged, _stages
from . import _xla as xla

Static = _call.Static | _combined_call.Static


def call(static: Static, launch: Any, batched_by_xla: bool, floats: Any, integers: Any) -> Any:
    """What the stage returns, or the combined operator's `Results`. `launch`: None for XLA."""
    if launch is None:
        return _by_xla(static)(floats, integers)
    return _run(static, launch, batched_by_xla, floats, integers)


def _by_xla(static: Static) -> Any:
    return partial(xla.stage if isinstance(static, _call.Static) else xla.combined, static)


def _by_kernel(static: Static, launch: Any, floats: Any, integers: Any) -> Any:
    if isinstance(static, _call.Static):
        return _stages.run(static, floats, integers)
    if isinstance(launch, _staged.Launch):
        return _staged.run(static, launch, floats, integers)
    return _fused.run(static, launch, floats, integers)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(static: Static, launch: Any, batched_by_xla: bool, floats: Any, integers: Any) -> Any:
    run = custom_vmap(partial(_by_kernel, static, launch))
    run.def_vmap(partial(_batched, static, batched_by_xla))
    return run(floats, integers)


def _batched(
    static: Static, by_xla: bool, axis_size: int, in_batched: tuple[Any, Any], floats: Any, integers: Any
) -> Any:
    """What `jax.vmap` makes of the kernel."""
    if not by_xla:
        op = f"ssd.{static.op}" if isinstance(static, _call.Static) else "mamba_chunk_scan_combined"
        raise Unsupported(
            f"{op}: the mosaic_gpu kernel is not batched by jax.vmap; give the batch its own rows or sequences, or use "
            "implementation='xla' or None"
        )
    axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
    batched = jax.vmap(_by_xla(static), in_axes=axes, axis_size=axis_size)(floats, integers)
    return batched, jax.tree.map(lambda _: True, batched)


def _forward(static: Static, launch: Any, batched_by_xla: bool, floats: Any, integers: Any) -> Any:
    return _run(static, launch, batched_by_xla, floats, integers), (floats, integers)


def _backward(static: Static, launch: Any, batched_by_xla: bool, residuals: Any, cotangents: Any) -> Any:
    floats, integers = residuals
    _, pullback = jax.vjp(lambda floats: _by_xla(static)(floats, integers), floats)
    return (*pullback(cotangents), None)


_run.defvjp(_forward, _backward)
