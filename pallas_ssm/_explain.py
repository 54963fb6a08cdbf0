"""Which implementation a call would get, with which launch parameters, and why."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

import ssm_configs

from . import _causal_conv1d_dispatch as conv
from . import _causal_conv1d_launch as conv_launch
from . import _selective_state_update_dispatch as ssu
from . import _selective_state_update_launch as ssu_launch
from ._arguments import ARRAYS

_SSU_OPTIONS = dict.fromkeys((*ssu.contract.OPTIONAL, "null_slot", "rounding_seed"))


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
        op: the operator's name, say "selective_state_update".
        *args, **kwargs: those of the operator. Shapes and dtypes are enough: a `jax.ShapeDtypeStruct` may stand for any
            array.
        implementation: as for the operator, whose errors are raised here too.
    """
    if op not in _OPS:
        raise ValueError(f"op: expected one of {tuple(_OPS)}, got {op!r}")
    return _OPS[op](op, implementation, *args, **kwargs, kinds=(*ARRAYS, jax.ShapeDtypeStruct))


def _selective_state_update(op: str, implementation: str | None, *args: Any, **kwargs: Any) -> Explanation:
    prepared = ssu.prepare(*args, **{**_SSU_OPTIONS, "dt_softplus": False, **kwargs})
    choice = ssu.choose(prepared, implementation)
    if choice.launch is None:
        return Explanation(op, choice.implementation, choice.reason)
    state_dtype = prepared.arrays["state"].dtype
    request = ssu_launch.config_request(prepared.static.dims, state_dtype, choice.target.device)
    return Explanation(op, choice.implementation, choice.reason, choice.launch, ssm_configs.explain(op, **request))


def _convolution(op: str, implementation: str | None, *args: Any, **kwargs: Any) -> Explanation:
    prepare = conv.prepare_update if op == conv_launch.UPDATE else conv.prepare_prefill
    prepared = prepare(*args, **kwargs)
    choice = conv.choose(prepared, implementation)
    if choice.launch is None:
        return Explanation(op, choice.implementation, choice.reason)
    # What is split launches as what is not.
    table = prepared.static.op
    request = conv_launch.config_request(table, prepared.static.dims, prepared.arrays["x"].dtype, choice.target.device)
    return Explanation(op, choice.implementation, choice.reason, choice.launch, ssm_configs.explain(table, **request))


_OPS: dict[str, Callable[..., Explanation]] = {
    ssu_launch.OP: _selective_state_update,
    conv_launch.PREFILL: _convolution,
    f"{conv_launch.PREFILL}_split": _convolution,
    conv_launch.UPDATE: _convolution,
}
