"""Which implementation a call would get, with which launch parameters, and why."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

import ssm_configs

from . import _causal_conv1d_dispatch as conv
from . import _causal_conv1d_launch as conv_launch
from . import _selective_state_update_dispatch as ssu
from . import _selective_state_update_launch as ssu_launch
from . import gdn, ssd
from ._arguments import ARRAYS
from .causal_conv1d import causal_conv1d, causal_conv1d_split
from .causal_conv1d_update import causal_conv1d_update
from .gdn import _dispatch as gdn_dispatch
from .gdn import _recurrent_dispatch as gdn_recurrent
from .selective_state_update import selective_state_update
from .ssd import _dispatch as ssd_dispatch


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
    """Every rule of the look-up in order, and the one that decided; None where no table was asked."""

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.implementation} ({self.reason})"]
        if self.lookup is not None:
            lines.append(str(self.lookup))
        if self.launch is not None:
            lines.append(f"  launched as {self.launch}")
        return "\n".join(lines)


def explain(op: str, *args: Any, implementation: str | None = None, **kwargs: Any) -> Explanation:
    """What `op` would do with these arguments; nothing runs.

    Args:
        op: the operator's name, say "selective_state_update" or "ssd.chunk_scan".
        *args, **kwargs: those of the operator. Shapes and dtypes are enough: a `jax.ShapeDtypeStruct` may stand for any
            array.
        implementation: as for the operator, whose errors are raised here too.
    """
    if not isinstance(op, str) or op not in _OPS:
        raise ValueError(f"op: expected one of {tuple(_OPS)}, got {op!r}")
    function, explained = _OPS[op]
    # As the operator takes them, and with its defaults.
    given = inspect.signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    del given.arguments["implementation"]
    return explained(op, implementation, **given.arguments, kinds=(*ARRAYS, jax.ShapeDtypeStruct))


def _selective_state_update(op: str, implementation: str | None, **given: Any) -> Explanation:
    prepared = ssu.prepare(**given)
    choice = ssu.choose(prepared, implementation)
    if choice.launch is None:
        return Explanation(op, choice.implementation, choice.reason)
    state_dtype = prepared.arrays["state"].dtype
    request = ssu_launch.config_request(prepared.static.dims, state_dtype, choice.target.device)
    return Explanation(op, choice.implementation, choice.reason, choice.launch, ssm_configs.explain(op, **request))


def _convolution(op: str, implementation: str | None, **given: Any) -> Explanation:
    prepare = conv.prepare_update if op == conv_launch.UPDATE else conv.prepare_prefill
    prepared = prepare(**given)
    choice = conv.choose(prepared, implementation)
    if choice.launch is None:
        return Explanation(op, choice.implementation, choice.reason)
    # What is split launches as what is not.
    table = prepared.static.op
    request = conv_launch.config_request(table, prepared.static.dims, prepared.arrays["x"].dtype, choice.target.device)
    return Explanation(op, choice.implementation, choice.reason, choice.launch, ssm_configs.explain(table, **request))


def _ssd(op: str, implementation: str | None, **given: Any) -> Explanation:
    if op == ssd_dispatch.COMBINED:
        prepared = ssd_dispatch.prepare_combined(**given)
    else:
        prepared = ssd_dispatch.prepare_stage(op.removeprefix("ssd."), **given)
    choice = ssd_dispatch.choose(prepared, implementation)
    lookup = None if choice.request is None else ssm_configs.explain(op, **choice.request)
    return Explanation(op, choice.implementation, choice.reason, choice.launch, lookup)


def _gdn(op: str, implementation: str | None, **given: Any) -> Explanation:
    if op == gdn_recurrent.OP:
        choice = gdn_recurrent.choose(gdn_recurrent.prepare(**given), implementation)
    else:
        choice = gdn_dispatch.choose(gdn_dispatch.prepare(op.removeprefix("gdn."), **given), implementation)
    lookup = None if choice.request is None else ssm_configs.explain(op, **choice.request)
    return Explanation(op, choice.implementation, choice.reason, choice.launch, lookup)


_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Explanation]]] = {
    **{(n if n.endswith("gated_delta_rule") else f"gdn.{n}"): (getattr(gdn, n), _gdn) for n in gdn.__all__},
    ssu_launch.OP: (selective_state_update, _selective_state_update),
    conv_launch.PREFILL: (causal_conv1d, _convolution),
    f"{conv_launch.PREFILL}_split": (causal_conv1d_split, _convolution),
    conv_launch.UPDATE: (causal_conv1d_update, _convolution),
    **{(n if n == ssd_dispatch.COMBINED else f"ssd.{n}"): (getattr(ssd, n), _ssd) for n in ssd.__all__},
}
"""The operator, and what explains it."""
