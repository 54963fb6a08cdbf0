"""What a loop of an XLA form begins with."""

from typing import Any

import jax
from jax import lax


def vary_alike(carry: Any, operands: Any) -> Any:
    """`carry`, varying over every mesh axis of a `jax.shard_map` that it or a loop's operands vary over.

    So will what the loop returns, and a carry may not change its type: zeros are at first the same everywhere.
    """
    leaves = jax.tree.leaves((carry, operands))
    axes = frozenset[Any]().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves))

    def vary(array: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(array).manual_axis_type.varying)
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(vary, carry)
