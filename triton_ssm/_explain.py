"""Which launch parameters a call would get, and why."""

from typing import Any

import ssm_configs

from .causal_conv1d import config_request as _causal_conv1d
from .causal_conv1d_update import config_request as _causal_conv1d_update
from .gdn.chunk_delta_h import config_request as _chunk_delta_h
from .gdn.chunk_local_cumsum import config_request as _chunk_local_cumsum
from .gdn.chunk_o import config_request as _chunk_o
from .gdn.chunk_scaled_dot_kkt import config_request as _chunk_scaled_dot_kkt
from .gdn.combined import config_request as _chunk_gated_delta_rule
from .gdn.recompute_w_u import config_request as _recompute_w_u
from .gdn.recurrent import config_request as _fused_recurrent
from .gdn.solve_tril import config_request as _solve_tril
from .selective_state_update import config_request as _selective_state_update
from .ssd.bmm_chunk import config_request as _bmm_chunk
from .ssd.chunk_cumsum import config_request as _chunk_cumsum
from .ssd.chunk_scan import config_request as _chunk_scan
from .ssd.chunk_state import config_request as _chunk_state
from .ssd.combined import explained as _mamba_chunk_scan_combined
from .ssd.state_passing import config_request as _state_passing

_OPS = {
    "selective_state_update": ("selective_state_update", _selective_state_update),
    "causal_conv1d": ("causal_conv1d", _causal_conv1d),
    "causal_conv1d_split": ("causal_conv1d", _causal_conv1d),
    "causal_conv1d_update": ("causal_conv1d_update", _causal_conv1d_update),
    "ssd.chunk_cumsum": ("ssd_chunk_cumsum", _chunk_cumsum),
    "ssd.chunk_state": ("ssd_chunk_state", _chunk_state),
    "ssd.state_passing": ("ssd_state_passing", _state_passing),
    "ssd.bmm_chunk": ("ssd_bmm_chunk", _bmm_chunk),
    "ssd.chunk_scan": ("ssd_chunk_scan", _chunk_scan),
    "gdn.chunk_delta_h": ("gdn_chunk_delta_h", _chunk_delta_h),
    "gdn.chunk_local_cumsum": ("gdn_chunk_local_cumsum", _chunk_local_cumsum),
    "gdn.chunk_o": ("gdn_chunk_o", _chunk_o),
    "gdn.chunk_scaled_dot_kkt": ("gdn_chunk_scaled_dot_kkt", _chunk_scaled_dot_kkt),
    "gdn.recompute_w_u": ("gdn_recompute_w_u", _recompute_w_u),
    "gdn.solve_tril": ("gdn_solve_tril", _solve_tril),
    "chunk_gated_delta_rule": ("chunk_gated_delta_rule", _chunk_gated_delta_rule),
    "fused_recurrent_gated_delta_rule": ("fused_recurrent_gated_delta_rule", _fused_recurrent),
}
# Those that also choose a path.
_EXPLAINED = {"mamba_chunk_scan_combined": _mamba_chunk_scan_combined}


def explain(op: str, *args: Any, **kwargs: Any) -> ssm_configs.Explanation:
    """Every rule of the look-up that `op` would do for these arguments, in order, and the one that decides; nothing runs.

    `str()` of the result is meant for people.

    Args:
        op: the operator's name, say "selective_state_update".
        *args, **kwargs: those of the operator, whose errors are raised here too.
    """
    if op not in (*_OPS, *_EXPLAINED):
        raise ValueError(f"op: expected one of {(*_OPS, *_EXPLAINED)}, got {op!r}")
    kwargs.pop("out", None)  # where y goes has no say in how it is computed
    if op in _EXPLAINED:
        return _EXPLAINED[op](*args, **kwargs)
    table, request = _OPS[op]
    return ssm_configs.explain(table, **request(*args, **kwargs))
