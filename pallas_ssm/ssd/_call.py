"""A checked call of one of the five stages: what a compiled program depends on. Its float arrays go by their names."""

from dataclasses import dataclass

from ssm_configs.contracts.ssd import Dims


@dataclass(frozen=True)
class Static:
    """Everything but the arrays that is known when the program is traced."""

    op: str
    """The stage's name, without "ssd."."""
    dims: Dims
    """`T` of state_passing, which has no tokens: the most that its slots can be for."""
    dtype: str = "float32"
    """Of x, B and C."""
    precision: str = "ieee"
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    state_dtype: str = "float32"
