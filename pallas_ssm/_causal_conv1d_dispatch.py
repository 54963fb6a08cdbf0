"""Checks a call of the convolution operators and chooses what runs it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

import ssm_configs
from ssm_configs.contracts import causal_conv1d as contract

from . import _arguments
from ._causal_conv1d_call import Floats, Integers, Static
from ._causal_conv1d_launch import (
    PREFILL,
    UPDATE,
    Launch,
    Unsupported,
    config_request,
    plan_prefill,
    plan_update,
)
from ._causal_conv1d_vjp import call
from ._device import Target, target
from ._overrides import check_override
from ._selective_state_update_launch import check_device

Implementation = Literal["mosaic_gpu", "xla"]
Activation = Literal["silu", "swish"]

IMPLEMENTATIONS = ("mosaic_gpu", "xla")


class Prepared(NamedTuple):
    """A checked call. The arrays are as they came; `operands` makes them what the implementations take."""

    static: Static
    arrays: Mapping[str, Any]

    def operands(self) -> tuple[Floats, Integers]:
        def array(*names: str) -> Any:
            return next((jnp.asarray(self.arrays[name]) for name in names if name in self.arrays), None)

        def index(*names: str) -> jax.Array | None:
            return _arguments.index_array(next((self.arrays[name] for name in names if name in self.arrays), None))

        floats = Floats(array("x"), array("weight"), array("bias"), array("conv_state", "initial_state"))
        integers = Integers(
            cu_seqlens=index("cu_seqlens"),
            slots=index("state_indices", "conv_state_indices"),
            has_initial=array("has_initial_state"),
            accepted=index("num_accepted_tokens"),
        )
        return floats, integers


@dataclass(frozen=True)
class Choice:
    implementation: str
    reason: str
    target: Target
    launch: Launch | None = None
    """How the kernel is launched; None for XLA."""


_WHOLE: Any = object()  # y, and not in parts


def prepare_prefill(
    x: Any,
    weight: Any,
    sizes: Any = _WHOLE,
    *,
    chunk_size: Any = None,
    activation: Any = None,
    null_slot: Any = None,
    kinds: tuple[type, ...] = _arguments.ARRAYS,
    **others: Any,
) -> Prepared:
    """Checks a call of `causal_conv1d` or, with sizes, `causal_conv1d_split`. `kinds`: what may stand for an array."""
    arrays = _check_arrays({"x": x, "weight": weight, **others}, ("x", "weight"), kinds)
    sizes = None if sizes is _WHOLE else contract.check_sizes(sizes)
    dims = contract.check_prefill(
        *_arguments.shapes_and_dtypes(arrays), null_slot=null_slot, sizes=sizes, chunk_size=chunk_size
    )
    silu = contract.silu_asked(activation)
    _arguments.check_slot_values(arrays, dims, ("state_indices",))
    return Prepared(Static(PREFILL, dims, silu, null_slot, sizes or (dims.D,), chunk_size), arrays)


def prepare_update(
    x: Any,
    conv_state: Any,
    weight: Any,
    *,
    activation: Any = None,
    null_slot: Any = None,
    kinds: tuple[type, ...] = _arguments.ARRAYS,
    **others: Any,
) -> Prepared:
    """Checks a call of `causal_conv1d_update`. `kinds`: what may stand for an array."""
    required = ("x", "conv_state", "weight")
    arrays = _check_arrays({"x": x, "conv_state": conv_state, "weight": weight, **others}, required, kinds)
    dims = contract.check_update(*_arguments.shapes_and_dtypes(arrays), null_slot=null_slot)
    silu = contract.silu_asked(activation)
    _arguments.check_slot_values(arrays, dims, ("conv_state_indices",))
    return Prepared(Static(UPDATE, dims, silu, null_slot), arrays)


def _check_arrays(arrays: Mapping[str, Any], required: tuple[str, ...], kinds: tuple[type, ...]) -> dict[str, Any]:
    given = _arguments.check_arrays(arrays, kinds)
    for name in required:
        if name not in given:
            raise TypeError(f"{name}: expected an array, got None")
    return given


def choose(prepared: Prepared, implementation: str | None) -> Choice:
    """Which implementation runs the call; `Unsupported` where it was asked for and cannot."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {IMPLEMENTATIONS} or None, got {implementation!r}")
    check_override()
    static, where = prepared.static, target(prepared.arrays.values())
    if implementation == "xla":
        return Choice("xla", "asked for", where)
    try:
        device = check_device(where, static.op)
        dims, dtype = static.dims, prepared.arrays["x"].dtype
        if dims.B == 0 or dims.T == 0 or dims.N_seq == 0:
            return Choice("xla", "there is no token", where)
        if static.pool and dims.S == 0:
            return Choice("xla", "there is no slot", where)
        config = ssm_configs.lookup(static.op, **config_request(static.op, dims, dtype, device))
        launch = (plan_update if static.op == UPDATE else plan_prefill)(static, dtype, config)
    except Unsupported as error:
        if implementation is not None:
            raise
        return Choice("xla", str(error).removeprefix(f"{static.op}: "), where)
    reason = "asked for" if implementation else f"the kernel takes this call on {device.name}"
    return Choice("mosaic_gpu", reason, where, launch)


def run(prepared: Prepared, implementation: str | None) -> Any:
    choice = choose(prepared, implementation)
    return call(prepared.static, choice.launch, implementation is None, *prepared.operands())
