"""Block indices taken apart."""

import jax
import jax.numpy as jnp
from jax import lax


def unravel(index: jax.Array, *sizes: int) -> tuple[jax.Array, ...]:
    """As `jnp.unravel_index`, of an index that is not negative; `sizes`: of all axes but the slowest.

    `//` and `%` see to signs that there are none of, and make the lowering convert a boolean each (see `_branches.when`).
    """
    places: list[jax.Array] = []
    for size in reversed(sizes):
        places.append(lax.rem(index, jnp.int32(size)))
        index = lax.div(index, jnp.int32(size))
    return index, *reversed(places)
