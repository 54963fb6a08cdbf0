"""One call of one operator, in words: dimensions, dtypes and options."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Case:
    """`dims` by the names of the operator's docstring; `options` are keyword arguments and what shapes the draw."""

    op: str
    name: str
    dims: Mapping[str, int]
    dtype: str = "bfloat16"
    state_dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()

    def __post_init__(self):
        object.__setattr__(self, "dims", MappingProxyType(dict(self.dims)))
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __str__(self) -> str:
        dims = " ".join(f"{key}={value}" for key, value in self.dims.items())
        return f"{self.name}: {dims} {self.dtype} state={self.state_dtype}"

    def with_dims(self, **dims: int) -> "Case":
        return replace(self, dims={**self.dims, **dims})
