"""Checks a call of `selective_state_update` and chooses what runs it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

import ssm_configs
from ssm_configs.contracts import selective_state_update as contract

from . import _arguments
from ._device import Target, target
from ._overrides import check_override
from ._selective_state_update_call import Floats, Integers, Static
from ._selective_state_update_launch import OP, Launch, Unsupported, check_device, config_request, plan_launch

IMPLEMENTATIONS = ("mosaic_gpu", "xla")


class Prepared(NamedTuple):
    """A checked call. The arrays are as they came; `operands` makes them what the implementations take."""

    static: Static
    arrays: Mapping[str, Any]
    rounding_seed: Any

    def operands(self) -> tuple[Floats, Integers]:
        floats: dict[str, Any] = dict.fromkeys(Floats._fields)
        floats |= {name: jnp.asarray(array) for name, array in self.arrays.items() if name in floats}
        indices = {name: _arguments.index_array(self.arrays.get(name)) for name in contract.INDICES}
        integers = Integers(
            source=indices["state_batch_indices"],
            target=indices["dst_state_batch_indices"],
            cu_seqlens=indices["cu_seqlens"],
            accepted=indices["num_accepted_tokens"],
            key=_arguments.rounding_key(self.rounding_seed),
        )
        return Floats(**floats), integers


@dataclass(frozen=True)
class Choice:
    implementation: str
    reason: str
    target: Target
    launch: Launch | None = None
    """How the kernel is launched; None for XLA."""


def prepare(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    *,
    dt_softplus: Any,
    null_slot: Any,
    rounding_seed: Any,
    kinds: tuple[type, ...] = _arguments.ARRAYS,
    **others: Any,
) -> Prepared:
    """Checks a call. `kinds`: what may stand for an array."""
    arrays = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, **others}
    arrays = _arguments.check_arrays(arrays, kinds)
    if type(dt_softplus) is not bool:
        raise TypeError(f"dt_softplus: expected a bool, got {type(dt_softplus).__name__}")
    for name in contract.REQUIRED:
        if name not in arrays:
            raise TypeError(f"{name}: expected an array, got None")
    dims = contract.check(
        *_arguments.shapes_and_dtypes(arrays), null_slot=null_slot, stochastic_rounding=rounding_seed is not None
    )
    _arguments.check_seed(rounding_seed, kinds)
    _arguments.check_slot_values(arrays, dims)
    return Prepared(Static(dims, dt_softplus, null_slot), arrays, rounding_seed)


def choose(prepared: Prepared, implementation: str | None) -> Choice:
    """Which implementation runs the call; `Unsupported` where it was asked for and cannot."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {IMPLEMENTATIONS} or None, got {implementation!r}")
    check_override()
    where = target(prepared.arrays.values())
    if implementation == "xla":
        return Choice("xla", "asked for", where)
    try:
        device = check_device(where)
        dims = prepared.static.dims
        if dims.T == 0 or dims.N_seq == 0:
            return Choice("xla", "there is no token", where)
        state_dtype = prepared.arrays["state"].dtype
        config = ssm_configs.lookup(OP, **config_request(dims, state_dtype, device))
        launch = plan_launch(
            dims,
            state_dtype,
            config,
            packed="cu_seqlens" in prepared.arrays,
            stochastic=prepared.rounding_seed is not None,
        )
    except Unsupported as error:
        if implementation is not None:
            raise
        return Choice("xla", str(error).removeprefix(f"{OP}: "), where)
    reason = "asked for" if implementation else f"the kernel takes this call on {device.name}"
    return Choice("mosaic_gpu", reason, where, launch)
