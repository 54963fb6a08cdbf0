"""Mamba-2 and gated-delta-rule operators for PyTorch in Triton; the twin of `pallas_ssm`, function by function."""

from ssm_configs import override as override
from ssm_configs.model_dims import ModelDims as ModelDims

from . import gdn as gdn
from . import layouts as layouts
from . import ssd as ssd
from ._explain import explain as explain
from .causal_conv1d import causal_conv1d as causal_conv1d
from .causal_conv1d import causal_conv1d_split as causal_conv1d_split
from .causal_conv1d_update import causal_conv1d_update as causal_conv1d_update
from .forbid_compiles import forbid_compiles as forbid_compiles
from .gdn import chunk_gated_delta_rule as chunk_gated_delta_rule
from .gdn import fused_recurrent_gated_delta_rule as fused_recurrent_gated_delta_rule
from .selective_state_update import selective_state_update as selective_state_update
from .ssd import mamba_chunk_scan_combined as mamba_chunk_scan_combined
from .warmup import warmup as warmup

__all__ = [
    "ModelDims",
    "causal_conv1d",
    "causal_conv1d_split",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "explain",
    "forbid_compiles",
    "fused_recurrent_gated_delta_rule",
    "gdn",
    "layouts",
    "mamba_chunk_scan_combined",
    "override",
    "selective_state_update",
    "ssd",
    "warmup",
]
