"""Branches inside of a kernel, as Mosaic GPU has them cheaply.

The compiler keeps, all through a branch, the registers of whatever comes after it. Where two branches exclude each other it has
to be told so: one `when` after the other is as right, but a role of many registers spills, and code is duplicated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Branch = Callable[[], Any]


def when(condition: Any) -> Callable[[Branch], None]:
    """`pl.when`, by a number.

    JAX would convert the condition to one, and for each conversion of booleans Mosaic GPU (jax 0.11) asks ptxas for its
    version, which takes 8 ms and more: a third of the time in which a kernel is lowered.
    """
    return lambda branch: _switch(jnp.where(condition, 0, -1), [branch])


def either(condition: jax.Array, then: Branch, otherwise: Branch) -> None:
    """Runs one of them, for what it does."""
    _switch(jnp.where(condition, 0, 1), [then, otherwise])


def choose_role(warpgroup: jax.Array, roles: Sequence[tuple[int, Callable[[Any], Any]]]) -> None:
    """Runs what this warpgroup is there for. `roles`: (warpgroups, what is run given which of these warpgroups it is)."""
    branches: list[Branch] = []
    which, first = jnp.int32(-1), 0
    for count, role in roles:
        mine: Any = warpgroup - first if count > 1 else 0
        branches.append(lambda role=role, mine=mine: role(mine))
        which = which + jnp.where(warpgroup >= first, 1, 0)
        first += count
    _switch(which, branches)


def _switch(index: jax.Array, branches: Sequence[Branch]) -> None:
    """Runs branch `index`, none for -1."""

    def run(branch: Branch) -> Callable[[], None]:
        def without_result() -> None:
            branch()

        return without_result

    # Mosaic GPU lowers the first branch twice, and what stands within it once more at every level: so nothing stands there.
    lax.switch((index + 1).astype(jnp.int32), [lambda: None, *map(run, branches)])
