"""What the parity report has to know of an operator: how it is called in each framework and which results are compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cases import Case

Results = dict[str, Any]
"""Results by name; parts of a split are "y[0]", "y[1]", …"""

Sizes = Callable[[Case], tuple[int, dict[str, int]]]

# How a state is stored and how products are rounded is the tolerance's matter, not the definition's.
_UNDEFINED = ("rounding_seed", "state_dtype", "precision", "return_final_states", "return_final_state")


def _stored(case: Case, output: str) -> tuple[str, ...]:
    """States are as exact as what stores them; y as x's dtype."""
    return (case.state_dtype if output == "state" else case.dtype,)


def _computed(case: Case, output: str) -> tuple[str, ...]:
    """Tensor cores round operands to x's dtype, and a state is then stored in its own."""
    return (case.dtype,) if output == "y" else (case.dtype, case.state_dtype)


def _fp32(case: Case, output: str) -> tuple[str, ...]:
    """Nothing is rounded but by fp32 arithmetic."""
    del case, output
    return ("float32",)


def _passed(case: Case, output: str) -> tuple[str, ...]:
    """fp32 until it is stored."""
    del output
    return (case.state_dtype,)


def _of_inputs(case: Case, output: str) -> tuple[str, ...]:
    """Operands of products are of the inputs' dtype, whatever is stored."""
    del output
    return (case.dtype,)


def _normalised(case: Case, output: str) -> tuple[str, ...]:
    """As stored, but normalised keys are rounded to their own dtype, and with them what a state takes up."""
    stored = _stored(case, output)
    return (*stored, case.dtype) if case.options.get("l2norm") else stored


def _chained(case: Case, output: str) -> tuple[str, ...]:
    """Rounded to k's dtype at every stage. The last states have a limit of their own, and so has o of keys that resemble
    each other."""
    if output != "y":
        return (f"{case.dtype}, state",)
    hard = case.options.get("resembling") and case.dtype != "float32"
    return (f"{case.dtype}, resembling" if hard else case.dtype,)


@dataclass(frozen=True)
class Operator:
    name: str
    """Its path below the package."""
    sizes: Sizes
    """(size, static keys) of the case's table row."""
    outputs: tuple[str, ...] = ("y", "state")
    """What it returns, in order; of later ones a case may have none."""
    mutated: int | None = None
    """The position of the argument that the torch form updates in place and does not return; None where it returns all."""
    exact_state: bool = False
    """Whether the state is a copy of inputs, bit for bit."""
    rounded_to: Callable[[Case, str], tuple[str, ...]] = _stored
    """The dtypes (or other keys of the tolerances) that a result has been rounded to on its way; the widest is its limit."""

    table_dtype: Callable[[Case], str] = lambda case: case.dtype
    """The dtype that its tables go by."""

    @property
    def table(self) -> str:
        """The name of its tables."""
        return self.name.replace(".", "_")

    def function(self, package: Any, keywords: Mapping[str, Any]) -> Callable[..., Any]:
        path, _, name = self.name.rpartition(".")
        return getattr(getattr(package, path) if path else package, f"{name}_split" if "sizes" in keywords else name)

    def named(self, returned: Any) -> Results:
        """What the oracle and the JAX functions return, by name."""
        results: Results = {}
        values = returned if isinstance(returned, tuple) else (returned,)
        for name, value in zip(self.outputs, values, strict=False):
            if isinstance(value, tuple | list):
                results |= {f"{name}[{i}]": part for i, part in enumerate(value)}
            elif value is not None:
                results[name] = value
        return results

    def torch_results(self, returned: Any, arguments: list[Any]) -> Results:
        """What a torch call returned and what it changed."""
        return self.named(returned if self.mutated is None else (returned, arguments[self.mutated]))


def _decode_sizes(case: Case) -> tuple[int, dict[str, int]]:
    return _sequences(case) * case.dims["H"], {"headdim": case.dims["P"], "dstate": case.dims["N"]}


def _conv_sizes(case: Case) -> tuple[int, dict[str, int]]:
    return case.dims["B"] * case.dims["T"] * case.dims["D"], {"width": case.dims["W"]}


def _conv_update_sizes(case: Case) -> tuple[int, dict[str, int]]:
    return case.dims["B"] * case.dims["D"], {"width": case.dims["W"]}


def _scan_sizes(case: Case) -> tuple[int, dict[str, int]]:
    H, P, N = (case.dims[key] for key in ("H", "P", "N"))
    return case.dims["B"] * case.dims["T"], {"nheads": H, "headdim": P, "dstate": N}


_STATIC_NAMES = {"H": "nheads", "P": "headdim", "N": "dstate", "L": "chunk_size", "K": "K", "V": "V"}


def _stage_sizes(per_token: str, statics: str) -> Sizes:
    """Tokens times the dimension `per_token`, and the dimensions that are static keys."""

    def sizes(case: Case) -> tuple[int, dict[str, int]]:
        dims = case.dims
        return dims["B"] * dims["T"] * dims.get(per_token, 1), {_STATIC_NAMES[dim]: dims[dim] for dim in statics}

    return sizes


def _delta_sizes(case: Case) -> tuple[int, dict[str, int]]:
    return _sequences(case) * case.dims["H_v"], {"K": case.dims["K"], "V": case.dims["V"], "chunk_size": case.dims["L"]}


def _recurrent_sizes(case: Case) -> tuple[int, dict[str, int]]:
    return _sequences(case) * case.dims["H_v"], {"K": case.dims["K"], "V": case.dims["V"]}


def _sequences(case: Case) -> int:
    return len(case.options["lengths"]) if "lengths" in case.options else case.dims["B"]


def _passing_sizes(case: Case) -> tuple[int, dict[str, int]]:
    return _sequences(case) * case.dims["H"], {"headdim": case.dims["P"], "dstate": case.dims["N"]}


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("selective_state_update", _decode_sizes, mutated=0, table_dtype=lambda case: case.state_dtype),
        Operator("causal_conv1d", _conv_sizes, exact_state=True),
        Operator("causal_conv1d_update", _conv_update_sizes, mutated=1, exact_state=True),
        Operator("ssd.chunk_cumsum", _stage_sizes("", "HL"), outputs=("dA_cumsum", "dt"), rounded_to=_fp32),
        Operator("ssd.chunk_state", _stage_sizes("H", "PNL"), outputs=("states",), rounded_to=_computed),
        Operator(
            "ssd.state_passing",
            _passing_sizes,
            outputs=("before", "final"),
            rounded_to=_passed,
            table_dtype=lambda case: "float32",
        ),
        Operator("ssd.bmm_chunk", _stage_sizes("G", "NL"), outputs=("CB",), rounded_to=_fp32),
        Operator("ssd.chunk_scan", _stage_sizes("H", "PNL"), outputs=("y",), rounded_to=_computed),
        Operator(
            "mamba_chunk_scan_combined", _scan_sizes, outputs=("y", "final", "intermediate"), rounded_to=_computed
        ),
        Operator(
            "gdn.chunk_local_cumsum",
            _stage_sizes("H_v", "L"),
            outputs=("g",),
            rounded_to=_fp32,
            table_dtype=lambda case: "float32",
        ),
        Operator("gdn.chunk_scaled_dot_kkt", _stage_sizes("H_v", "KL"), outputs=("A",), rounded_to=_fp32),
        Operator(
            "gdn.solve_tril",
            _stage_sizes("H_v", "L"),
            outputs=("inverse",),
            rounded_to=_fp32,
            table_dtype=lambda case: "float32",
        ),
        Operator("gdn.recompute_w_u", _stage_sizes("H_v", "KVL"), outputs=("w", "u"), rounded_to=_of_inputs),
        Operator("gdn.chunk_delta_h", _delta_sizes, outputs=("h", "v_new", "final"), rounded_to=_of_inputs),
        Operator("gdn.chunk_o", _stage_sizes("H_v", "KVL"), outputs=("y",), rounded_to=_of_inputs),
        Operator("chunk_gated_delta_rule", _delta_sizes, outputs=("y", "final"), rounded_to=_chained),
        Operator(
            "fused_recurrent_gated_delta_rule",
            _recurrent_sizes,
            mutated=5,
            rounded_to=_normalised,
            table_dtype=lambda case: case.state_dtype,
        ),
    )
}


def oracle_results(case: Case, arguments: tuple[np.ndarray, ...], keywords: Mapping[str, Any]) -> Results:
    from . import oracle
    from .oracle import gdn

    operator = OPERATORS[case.op]
    defined = {name: value for name, value in keywords.items() if name not in _UNDEFINED}
    # The gated delta rule's definitions are all in one module, the public ones too.
    function = getattr(gdn, case.op, None) or operator.function(oracle, keywords)
    # Token by token many tokens would take too long.
    if case.dims.get("T", 0) > 256:
        by_stages = {
            "mamba_chunk_scan_combined": oracle.mamba_chunk_scan_by_stages,
            "chunk_gated_delta_rule": gdn.chunk_gated_delta_rule_by_stages,
        }
        function = by_stages.get(case.op, function)
    return operator.named(function(*arguments, **defined))
