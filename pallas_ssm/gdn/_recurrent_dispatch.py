"""Checks a call of `fused_recurrent_gated_delta_rule` and runs it. Its backward pass is that of the XLA scan."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssm_configs.contracts import gdn as contract

from .. import _arguments
from .._device import target
from .._overrides import check_override
from .._selective_state_update_launch import Unsupported, check_device
from . import _recurrent_xla as xla
from ._dispatch import Choice, check_implementation
from ._recurrent_call import OP, Floats, Integers, Static

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
        {name: tuple(array.shape) for name, array in given.items()},
        {name: jnp.dtype(array.dtype).name for name, array in given.items()},
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
        check_device(where, OP)
        raise Unsupported(f"{OP}: there is no mosaic_gpu kernel of this operator; use implementation='xla' or None")
    except Unsupported as error:
        if implementation is not None:
            raise
        return Choice("xla", str(error).removeprefix(f"{OP}: "), where)


def run(prepared: Prepared, implementation: str | None) -> Any:
    choose(prepared, implementation)
    return _run(prepared.static, *prepared.operands())


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(static: Static, floats: Floats, integers: Integers) -> xla.Result:
    return xla.forward(static, floats, integers)


def _forward(static: Static, floats: Floats, integers: Integers):
    return _run(static, floats, integers), (floats, integers)


def _backward(static: Static, residuals, cotangents):
    floats, integers = residuals
    _, pullback = jax.vjp(lambda floats: xla.differentiable(static, floats, integers), floats)
    return (*pullback(cotangents), None)


_run.defvjp(_forward, _backward)
