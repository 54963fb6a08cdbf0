"""One function over both implementations; the kernels' backward pass is that of the XLA form."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.custom_batching import custom_vmap

from ssm_configs import Device

from .._selective_state_update_launch import Unsupported
from . import _chunk_o_kernel, _fused, _xla
from ._call import Floats, Static


class Kernel(NamedTuple):
    """A Mosaic GPU kernel of one operator."""

    plan: Callable[[Static, Mapping[str, Any], Device], Any]
    """The launch, hashable, of a checked call on a device; `Unsupported` where there is none."""
    run: Callable[[Static, Any, Floats, jax.Array | None], Any]
    """What the public function returns, from the static part, that launch, the float arrays and cu_seqlens."""


KERNELS: dict[str, Kernel] = {
    "chunk_o": Kernel(_chunk_o_kernel.plan, _chunk_o_kernel.run),
    "chunk_gated_delta_rule": Kernel(_fused.plan, _fused.run),
}
"""By operator. One without an entry has its XLA form alone."""


def call(static: Static, launch: Any, batched_by_xla: bool, floats: Floats, cu_seqlens: jax.Array | None) -> Any:
    """`launch`: None for XLA."""
    if launch is None:
        return _xla.forward(static, floats, cu_seqlens)
    return _run(static, launch, batched_by_xla, floats, cu_seqlens)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(static: Static, launch: Any, batched_by_xla: bool, floats: Floats, cu_seqlens: jax.Array | None) -> Any:
    run = custom_vmap(partial(KERNELS[static.op].run, static, launch))
    run.def_vmap(partial(_batched, static, batched_by_xla))
    return run(floats, cu_seqlens)


def _batched(
    static: Static, by_xla: bool, axis_size: int, in_batched: Any, floats: Floats, cu_seqlens: jax.Array | None
) -> Any:
    """What `jax.vmap` makes of the kernel."""
    if not by_xla:
        raise Unsupported(
            f"{static.op}: the mosaic_gpu kernel is not batched by jax.vmap; give the batch its own rows, or use "
            "implementation='xla' or None"
        )
    axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
    batched = jax.vmap(partial(_xla.forward, static), in_axes=axes, axis_size=axis_size)(floats, cu_seqlens)
    return batched, jax.tree.map(lambda _: True, batched)


def _forward(static: Static, launch: Any, batched_by_xla: bool, floats: Floats, cu_seqlens: jax.Array | None) -> Any:
    return _run(static, launch, batched_by_xla, floats, cu_seqlens), (floats, cu_seqlens)


def _backward(static: Static, launch: Any, batched_by_xla: bool, residuals: Any, cotangents: Any) -> Any:
    floats, cu_seqlens = residuals
    _, pullback = jax.vjp(lambda floats: _xla.forward(static, floats, cu_seqlens), floats)
    return (*pullback(cotangents), None)


_run.defvjp(_forward, _backward)
