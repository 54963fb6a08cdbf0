"""Checks a call of `fused_recurrent_gated_delta_rule` and runs it. Its backward pass is that of the XLA scan."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

import ssm_configs
from ssm_configs.contracts import gdn as contract

from .. import _arguments
from .._device import target
from .._overrides import check_override
from .._selective_state_update_launch import Unsupported, check_device
from . import _recurrent_kernel as kernel
from . import _recurrent_xla as xla
from ._dispatch import Choice, check_implementation
from ._recurrent_call import OP, Floats, Integers, Static
from ._recurrent_launch import Launch, config_request, plan_launch

_SLOTS = ("state_indices", "dst_state_indices")


class Prepared(NamedTuple):
    """A checked call. The arrays are as they came; `operands` makes them what the implementations take."""

    static: Static
    arrays: Mapping[str, Any]

    @property
    def op(self) -> str:
        return OP

    def operands(self) -> tuple[Floats, Integers]:
        floats: dict[str, Any] = dict.fromkeys(Floats._fields)
        floats |= {name: jnp.asarray(array) for name, array in self.arrays.items() if name in floats}
        indices = ("state_indices", "dst_state_indices", "cu_seqlens", "num_accepted_tokens")
        return Floats(**floats), Integers(*(_arguments.index_array(self.arrays.get(name)) for name in indices))


def prepare(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    state: Any,
    *,
    scale: Any = None,
    sigmoid_beta: Any = False,
    use_qk_l2norm: Any = False,
    null_slot: Any = None,
    kinds: tuple[type, ...] = _arguments.ARRAYS,
    **others: Any,
) -> Prepared:
    """Checks a call. `kinds`: what may stand for an array."""
    required = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state}
    given = _arguments.check_arrays(required | others, kinds)
    for name in required:
        if name not in given:
            raise TypeError(f"{name}: expected an array, got None")
    dims = contract.check_recurrent(
        *_arguments.shapes_and_dtypes(given),
        null_slot=null_slot,
    )
    _arguments.check_slot_values(given, dims, _SLOTS)
    static = Static(
        dims,
        contract.check_scale(scale, dims.K),
        contract.check_flag("sigmoid_beta", sigmoid_beta),
        contract.check_flag("use_qk_l2norm", use_qk_l2norm),
        null_slot,
    )
    return Prepared(static, given)


def choose(prepared: Prepared, implementation: str | None) -> Choice:
    """Which implementation runs the call; `Unsupported` where it was asked for and cannot."""
    check_implementation(implementation)
    check_override()
    where = target(prepared.arrays.values())
    if implementation == "xla":
        return Choice("xla", "asked for", where)
    try:
        device = check_device(where, OP)
        dims = prepared.static.dims
        if dims.T == 0 or dims.N_seq == 0:
            return Choice("xla", "there is no token", where)
        state_dtype = prepared.arrays["state"].dtype
        request = config_request(dims, state_dtype, device)
        knobs = ssm_configs.lookup(OP, **request)
        launch = plan_launch(dims, state_dtype, knobs, packed="cu_seqlens" in prepared.arrays)
    except Unsupported as error:
        if implementation is not None:
            raise
        return Choice("xla", str(error).removeprefix(f"{OP}: "), where)
    reason = "asked for" if implementation else f"the kernel takes this call on {device.name}"
    return Choice("mosaic_gpu", reason, where, launch, request)


def run(prepared: Prepared, implementation: str | None) -> xla.Result:
    choice = choose(prepared, implementation)
    result: Any = _run(prepared.static, choice.launch, implementation is None, *prepared.operands())
    return result


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(static: Static, launch: Launch | None, batched_by_xla: bool, floats: Floats, integers: Integers) -> xla.Result:
    if launch is None:
        return xla.forward(static, floats, integers)
    run = custom_vmap(partial(kernel.run, static, launch))
    run.def_vmap(partial(_batched, static, batched_by_xla))
    return run(floats, integers)


def _batched(
    static: Static, by_xla: bool, axis_size: int, in_batched: Any, floats: Floats, integers: Integers
) -> tuple[xla.Result, tuple[bool, bool]]:
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


def _backward(static: Static, launch: Launch | None, batched_by_xla: bool, residuals: Any, cotangents: Any):
    floats, integers = residuals
    _, pullback = jax.vjp(lambda floats: xla.differentiable(static, floats, integers), floats)
    return (*pullback(cotangents), None)


_run.defvjp(_forward, _backward)
