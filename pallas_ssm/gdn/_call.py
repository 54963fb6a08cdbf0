"""A checked call of a stage or of the combined operator: what a compiled program depends on. Float arrays go by their names."""

from dataclasses import dataclass

import jax

from ssm_configs.contracts.gdn import Dims

Floats = dict[str, jax.Array]
"""The arguments that a gradient can be taken in."""


@dataclass(frozen=True)
class Static:
    """Everything but the arrays that is known when the program is traced. What an operator does not have keeps its default."""

    op: str
    """The operator's name, without "gdn."."""
    dims: Dims
    precision: str = "ieee"
    """Of products of fp32 operands."""
    scale: float = 1.0
    gate_base: str = "e"
    state_layout: str = "KV"
    out_dtype: str = "float32"
    use_qk_l2norm: bool = False
    return_final_state: bool = True
