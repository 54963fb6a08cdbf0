"""Mamba-2 operators for PyTorch in Triton; the twin of `pallas_ssm`, function by function."""

from ssm_configs import override as override

from . import layouts as layouts
from ._explain import explain as explain
from .causal_conv1d import causal_conv1d as causal_conv1d
from .causal_conv1d import causal_conv1d_split as causal_conv1d_split
from .causal_conv1d_update import causal_conv1d_update as causal_conv1d_update
from .selective_state_update import selective_state_update as selective_state_update

__all__ = [
    "causal_conv1d",
    "causal_conv1d_split",
    "causal_conv1d_update",
    "explain",
    "layouts",
    "override",
    "selective_state_update",
]
