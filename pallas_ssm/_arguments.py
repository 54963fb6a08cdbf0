"""From JAX arrays to what the contracts check. Nothing here runs on a device or waits for one."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ssm_configs.contracts.selective_state_update import INDICES

ARRAYS = (jax.Array, np.ndarray, np.generic)


def check_arrays(arrays: Mapping[str, Any], kinds: tuple[type, ...] = ARRAYS) -> dict[str, Any]:
    """The arrays among the arguments; TypeError for anything that is neither an array nor None."""
    for name, array in arrays.items():
        if array is not None and not isinstance(array, kinds):
            raise TypeError(f"{name}: expected an array, got {type(array).__name__}")
    return {name: array for name, array in arrays.items() if array is not None}


def shapes_and_dtypes(arrays: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """What the contracts check: shapes, and the dtypes' names, also of those that are JAX's own (of random keys)."""
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    return shapes, {name: array.dtype.name for name, array in arrays.items()}


def check_slot_values(arrays: Mapping[str, Any], dims: Any, names: Sequence[str] = INDICES[:2]) -> None:
    """What the index arrays hold, where looking waits for no device: concrete values on the host.

    `names`: the arrays that hold slots, of which there are `dims.S`; bounds are of `dims.T` tokens.
    """
    for name in names:
        slots = _on_host(arrays.get(name))
        if slots is not None and slots.size and int(slots.max()) >= dims.S:
            raise ValueError(f"{name}: expected slots < S={dims.S}, got {int(slots.max())}")
    bounds = _on_host(arrays.get("cu_seqlens"))
    if bounds is not None and (bounds[0] != 0 or (np.diff(bounds) < 0).any() or bounds[-1] > dims.T):
        raise ValueError(f"cu_seqlens: expected 0 <= … <= T={dims.T} without a descent, got {bounds.tolist()}")


def _on_host(array: Any) -> np.ndarray | None:
    if not isinstance(array, ARRAYS) or isinstance(array, Tracer):
        return None
    if isinstance(array, jax.Array) and any(device.platform != "cpu" for device in array.devices()):
        return None
    return np.asarray(array)


def index_array(array: Any) -> jax.Array | None:
    """int32; what an int64 holds beyond its range stays out of every range it is compared with."""
    if array is None:
        return None
    if array.dtype == jnp.int32:
        return jnp.asarray(array)
    limits = np.iinfo(np.int32)
    if not isinstance(array, jax.Array):
        # As NumPy's, for JAX would first cut it to 32 bits.
        return jnp.asarray(np.clip(array, limits.min, limits.max).astype(np.int32))
    return jnp.clip(array, limits.min, limits.max).astype(jnp.int32)


def check_seed(seed: Any, kinds: tuple[type, ...] = ARRAYS) -> None:
    if seed is None:
        return
    if isinstance(seed, kinds):
        if seed.shape != () or seed.dtype.name not in ("int32", "uint32", "int64", "uint64"):
            raise ValueError(
                f"rounding_seed: expected a scalar of dtype int32, uint32, int64 or uint64, got shape {seed.shape} "
                f"{seed.dtype.name}"
            )
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"rounding_seed: expected an int, an integer scalar array or None, got {type(seed).__name__}")
    elif not 0 <= seed < 2**64:
        raise ValueError(f"rounding_seed: expected 0 <= seed < 2**64, got {seed}")


def rounding_key(seed: Any) -> jax.Array | None:
    """A checked seed as Philox's key, two 32-bit words, low word first."""
    if seed is None:
        return None
    if isinstance(seed, jax.Array):
        # 32 bits of seed are not a number to sign-extend into the upper half of the key.
        if seed.dtype.itemsize == 4:
            low = seed.astype(jnp.uint32)
            return jnp.stack([low, jnp.zeros_like(low)])
        bits = seed.astype(jnp.uint64)
        return jnp.stack([bits, bits >> 32]).astype(jnp.uint32)
    width = 32 if isinstance(seed, np.ndarray | np.generic) and seed.dtype.itemsize == 4 else 64
    number = int(seed) % 2**width
    return jnp.asarray(np.array([number & 0xFFFFFFFF, number >> 32], np.uint32))
