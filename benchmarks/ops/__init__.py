"""The operators that are benchmarked: one declaration each, and of the stages of one operator a module."""

from ..op import BenchOp
from .causal_conv1d import CAUSAL_CONV1D
from .causal_conv1d_update import CAUSAL_CONV1D_UPDATE
from .chunk_gated_delta_rule import CHUNK_GATED_DELTA_RULE
from .fused_recurrent_gated_delta_rule import FUSED_RECURRENT_GATED_DELTA_RULE
from .gdn_chunk_o import GDN_CHUNK_O
from .gdn_stages import (
    GDN_CHUNK_DELTA_H,
    GDN_CHUNK_LOCAL_CUMSUM,
    GDN_CHUNK_SCALED_DOT_KKT,
    GDN_RECOMPUTE_W_U,
    GDN_SOLVE_TRIL,
)
from .mamba_chunk_scan_combined import MAMBA_CHUNK_SCAN_COMBINED
from .selective_state_update import SELECTIVE_STATE_UPDATE
from .ssd_products import SSD_BMM_CHUNK, SSD_CHUNK_SCAN, SSD_CHUNK_STATE
from .ssd_sums import SSD_CHUNK_CUMSUM, SSD_STATE_PASSING

OPS: dict[str, BenchOp] = {
    op.name: op
    for op in (
        SELECTIVE_STATE_UPDATE,
        CAUSAL_CONV1D,
        CAUSAL_CONV1D_UPDATE,
        MAMBA_CHUNK_SCAN_COMBINED,
        SSD_CHUNK_CUMSUM,
        SSD_CHUNK_STATE,
        SSD_STATE_PASSING,
        SSD_BMM_CHUNK,
        SSD_CHUNK_SCAN,
        CHUNK_GATED_DELTA_RULE,
        GDN_CHUNK_LOCAL_CUMSUM,
        GDN_CHUNK_SCALED_DOT_KKT,
        GDN_SOLVE_TRIL,
        GDN_RECOMPUTE_W_U,
        GDN_CHUNK_DELTA_H,
        GDN_CHUNK_O,
        FUSED_RECURRENT_GATED_DELTA_RULE,
    )
}

_PREFIXES = {"ssd.": MAMBA_CHUNK_SCAN_COMBINED.name, "gdn.": CHUNK_GATED_DELTA_RULE.name}
STAGES: dict[str, str] = {
    name: whole for name, op in OPS.items() for prefix, whole in _PREFIXES.items() if op.operator.startswith(prefix)
}
"""The operators that are stages, with the one that each is a stage of."""
