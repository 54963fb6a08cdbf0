"""What the parity report has to know of an operator: how it is called in each framework and which results are compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cases import Case

Results = dict[str, Any]
"""Results by name: "y" (or "y[0]", "y[1]", … of a split), and "state"."""


@dataclass(frozen=True)
class Operator:
    name: str
    mutated: int | None
    """The position of the argument that the torch form updates in place and does not return; None where it returns all."""
    exact_state: bool
    """Whether the state is a copy of inputs, bit for bit."""
    sizes: Callable[[Case], tuple[int, dict[str, int]]]
    """(size, static keys) of the case's table row."""

    def function(self, package: Any, keywords: Mapping[str, Any]) -> Callable[..., Any]:
        return getattr(package, f"{self.name}_split" if "sizes" in keywords else self.name)

    def torch_results(self, returned: Any, arguments: list[Any]) -> Results:
        """What a torch call returned and what it changed."""
        return named(returned if self.mutated is None else (returned, arguments[self.mutated]))


def named(returned: Any) -> Results:
    """(y, state) or ((part, …), state) by name: what the oracle and the JAX functions return."""
    y, state = returned
    parts = {f"y[{i}]": part for i, part in enumerate(y)} if isinstance(y, tuple | list) else {"y": y}
    return {**parts, "state": state}


def _decode_sizes(case: Case) -> tuple[int, dict[str, int]]:
    sequences = len(case.options["lengths"]) if "lengths" in case.options else case.dims["B"]
    return sequences * case.dims["H"], {"headdim": case.dims["P"], "dstate": case.dims["N"]}


def _conv_sizes(case: Case) -> tuple[int, dict[str, int]]:
    return case.dims["B"] * case.dims["T"] * case.dims["D"], {"width": case.dims["W"]}


def _conv_update_sizes(case: Case) -> tuple[int, dict[str, int]]:
    return case.dims["B"] * case.dims["D"], {"width": case.dims["W"]}


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("selective_state_update", 0, False, _decode_sizes),
        Operator("causal_conv1d", None, True, _conv_sizes),
        Operator("causal_conv1d_update", 1, True, _conv_update_sizes),
    )
}


def oracle_results(case: Case, arguments: tuple[np.ndarray, ...], keywords: Mapping[str, Any]) -> Results:
    from . import oracle

    operator = OPERATORS[case.op]
    # How a state is rounded is the tolerance's matter, not the definition's.
    defined = {name: value for name, value in keywords.items() if name != "rounding_seed"}
    return named(operator.function(oracle, keywords)(*arguments, **defined))
