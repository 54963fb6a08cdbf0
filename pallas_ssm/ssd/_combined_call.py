"""A checked call of `mamba_chunk_scan_combined`, in two parts: what a compiled program depends on, and the arrays."""

from dataclasses import dataclass
from typing import NamedTuple

import jax

from ssm_configs.contracts.ssd import Dims


@dataclass(frozen=True)
class Static:
    """Everything that is known when the program is traced."""

    dims: Dims
    dtype: str
    """Of x, B, C, z and y."""
    state_dtype: str
    """Of the final and intermediate states."""
    dt_softplus: bool
    dt_limit: tuple[float, float]
    chunk_aligned: bool
    """x, B and C have their sequences at whole chunks of dims.L."""
    return_final_states: bool
    return_intermediate_states: bool
    precision: str = "ieee"


class Floats(NamedTuple):
    """The arrays that have gradients, as the caller gave them."""

    x: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array | None
    z: jax.Array | None
    dt_bias: jax.Array | None
    initial_states: jax.Array | None


class Integers(NamedTuple):
    cu_seqlens: jax.Array | None


class Results(NamedTuple):
    y: jax.Array
    """[B,T,H,P]"""
    final: jax.Array | None
    """[N_seq,H,P,N]"""
    intermediate: jax.Array | None
    """[B,NC,H,P,N]"""
