"""One checked call of `fused_recurrent_gated_delta_rule`, in the form that every implementation takes."""

from dataclasses import dataclass
from typing import NamedTuple

import jax

from ssm_configs.contracts.gdn import RecurrentDims

OP = "fused_recurrent_gated_delta_rule"


class Floats(NamedTuple):
    """The arguments that a gradient can be taken in."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    beta: jax.Array
    state: jax.Array
    A_log: jax.Array | None
    dt_bias: jax.Array | None


class Integers(NamedTuple):
    """int32 indices."""

    source: jax.Array | None
    target: jax.Array | None
    cu_seqlens: jax.Array | None
    accepted: jax.Array | None


@dataclass(frozen=True)
class Static:
    """What keys a compile."""

    dims: RecurrentDims
    scale: float
    sigmoid_beta: bool
    use_qk_l2norm: bool
    null_slot: int | None

    def is_padding(self, slot: jax.Array) -> jax.Array:
        return slot < 0 if self.null_slot is None else (slot < 0) | (slot == self.null_slot)
