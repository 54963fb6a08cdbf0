"""Which implementation a call would get, with which launch parameters, and why."""

from dataclasses import dataclass
from typing import Any

import jax

import ssm_configs

from . import _selective_state_update_dispatch as ssu
from ._arguments import ARRAYS
from ._selective_state_update_launch import config_request

_OPTIONS = dict.fromkeys((*ssu.contract.OPTIONAL, "null_slot", "rounding_seed"))


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`; `str()` prints it."""

    op: str
    implementation: str
    """"mosaic_gpu" or "xla"."""
    reason: str
    launch: Any = None
    """The kernel's launch as it will be. Its knobs may have given way to what the shape has; None for XLA."""
    lookup: ssm_configs.Explanation | None = None
    """Every rule of the look-up in order, and the one that decided; None for XLA."""

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.implementation} ({self.reason})"]
        if self.lookup is not None:
            lines += [str(self.lookup), f"  launched as {self.launch}"]
        return "\n".join(lines)


def explain(op: str, *args: Any, implementation: str | None = None, **kwargs: Any) -> Explanation:
    """What `op` would do with these arguments; nothing runs.

    Args:
        op: the operator's name, "selective_state_update".
        *args, **kwargs: those of the operator. Shapes and dtypes are enough: a `jax.ShapeDtypeStruct` may stand for any
            array.
        implementation: as for the operator, whose errors are raised here too.
    """
    if op != ssu.OP:
        raise ValueError(f"op: expected {ssu.OP!r}, got {op!r}")
    kinds = (*ARRAYS, jax.ShapeDtypeStruct)
    prepared = ssu.prepare(*args, **{**_OPTIONS, "dt_softplus": False, **kwargs}, kinds=kinds)
    choice = ssu.choose(prepared, implementation)
    if choice.launch is None:
        return Explanation(op, choice.implementation, choice.reason)
    request = config_request(prepared.static.dims, prepared.arrays["state"].dtype, choice.target.device)
    return Explanation(op, choice.implementation, choice.reason, choice.launch, ssm_configs.explain(op, **request))
