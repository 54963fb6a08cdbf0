"""Mamba-2 operators for PyTorch in Triton; the twin of `pallas_ssm`, function by function."""

from ssm_configs import override as override

from ._explain import explain as explain
from .selective_state_update import selective_state_update as selective_state_update

__all__ = ["explain", "override", "selective_state_update"]
