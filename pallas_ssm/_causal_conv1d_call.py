"""One checked call of `causal_conv1d` or `causal_conv1d_update`, in the form that every implementation takes."""

from dataclasses import dataclass
from typing import NamedTuple

import jax

from ssm_configs.contracts.causal_conv1d import Dims


class Floats(NamedTuple):
    """The arguments that a gradient can be taken in."""

    x: jax.Array
    weight: jax.Array
    bias: jax.Array | None
    state: jax.Array | None
    """The pool, or the initial states."""


class Integers(NamedTuple):
    """int32, except `has_initial`."""

    cu_seqlens: jax.Array | None
    slots: jax.Array | None
    has_initial: jax.Array | None
    accepted: jax.Array | None


@dataclass(frozen=True)
class Static:
    """What keys a compile."""

    op: str
    dims: Dims
    silu: bool
    null_slot: int | None
    sizes: tuple[int, ...] = ()
    """Channels of each output; not of an update."""
    chunk_size: int | None = None
    """Rows that a sequence's first row of the output is a multiple of."""

    @property
    def pool(self) -> bool:
        """Whether `Floats.state` is a pool of slots."""
        return self.dims.L > 0

    @property
    def offsets(self) -> tuple[int, ...]:
        """The first channel of each output."""
        return tuple(sum(self.sizes[:i]) for i in range(len(self.sizes)))

    def is_padding(self, slot: jax.Array) -> jax.Array:
        return slot < 0 if self.null_slot is None else (slot < 0) | (slot == self.null_slot)
