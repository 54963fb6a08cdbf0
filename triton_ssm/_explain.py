"""Which launch parameters a call would get, and why."""

from typing import Any

import ssm_configs

from .causal_conv1d import config_request as _causal_conv1d
from .causal_conv1d_update import config_request as _causal_conv1d_update
from .selective_state_update import config_request as _selective_state_update

_OPS = {
    "selective_state_update": ("selective_state_update", _selective_state_update),
    "causal_conv1d": ("causal_conv1d", _causal_conv1d),
    "causal_conv1d_split": ("causal_conv1d", _causal_conv1d),
    "causal_conv1d_update": ("causal_conv1d_update", _causal_conv1d_update),
}


def explain(op: str, *args: Any, **kwargs: Any) -> ssm_configs.Explanation:
    """Every rule of the look-up that `op` would do for these arguments, in order, and the one that decides; nothing runs.

    `str()` of the result is meant for people.

    Args:
        op: the operator's name, say "selective_state_update".
        *args, **kwargs: those of the operator, whose errors are raised here too.
    """
    if op not in _OPS:
        raise ValueError(f"op: expected one of {tuple(_OPS)}, got {op!r}")
    table, request = _OPS[op]
    kwargs.pop("out", None)  # where y goes has no say in how it is computed
    return ssm_configs.explain(table, **request(*args, **kwargs))
