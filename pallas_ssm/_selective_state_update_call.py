"""One checked call of `selective_state_update`, in the form that every implementation takes."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssm_configs.contracts.selective_state_update import Dims


class Floats(NamedTuple):
    """The arguments that a gradient can be taken in, with a head axis (of size 1 in a head-less call)."""

    state: jax.Array
    x: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array | None
    z: jax.Array | None
    dt_bias: jax.Array | None


class Integers(NamedTuple):
    """int32 indices, and the two words of the rounding key."""

    source: jax.Array | None
    target: jax.Array | None
    cu_seqlens: jax.Array | None
    accepted: jax.Array | None
    key: jax.Array | None


@dataclass(frozen=True)
class Static:
    """What keys a compile."""

    dims: Dims
    dt_softplus: bool
    null_slot: int | None

    def is_padding(self, slot: jax.Array) -> jax.Array:
        return slot < 0 if self.null_slot is None else (slot < 0) | (slot == self.null_slot)


def with_heads(floats: Floats) -> Floats:
    """A head-less call with its head axis put in: H = G = 1."""
    given = {name: array for name, array in floats._asdict().items() if array is not None}
    axes = {name: 0 if name in ("A", "D", "dt_bias") else 1 for name in given}
    return floats._replace(**{name: jnp.expand_dims(array, axes[name]) for name, array in given.items()})
