"""The operators that have tuning tables: one module, one declaration each."""

from collections.abc import Mapping
from types import MappingProxyType

from ..spec import OpSpec
from .causal_conv1d import CAUSAL_CONV1D
from .causal_conv1d_update import CAUSAL_CONV1D_UPDATE
from .chunk_gated_delta_rule import CHUNK_GATED_DELTA_RULE
from .fused_recurrent_gated_delta_rule import FUSED_RECURRENT_GATED_DELTA_RULE
from .gdn_chunk_delta_h import GDN_CHUNK_DELTA_H
from .gdn_chunk_local_cumsum import GDN_CHUNK_LOCAL_CUMSUM
from .gdn_chunk_o import GDN_CHUNK_O
from .gdn_chunk_scaled_dot_kkt import GDN_CHUNK_SCALED_DOT_KKT
from .gdn_recompute_w_u import GDN_RECOMPUTE_W_U
from .gdn_solve_tril import GDN_SOLVE_TRIL
from .mamba_chunk_scan_combined import MAMBA_CHUNK_SCAN_COMBINED
from .selective_state_update import SELECTIVE_STATE_UPDATE
from .ssd_bmm_chunk import SSD_BMM_CHUNK
from .ssd_chunk_cumsum import SSD_CHUNK_CUMSUM
from .ssd_chunk_scan import SSD_CHUNK_SCAN
from .ssd_chunk_state import SSD_CHUNK_STATE
from .ssd_state_passing import SSD_STATE_PASSING

SPECS: Mapping[str, OpSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            SELECTIVE_STATE_UPDATE,
            CAUSAL_CONV1D,
            CAUSAL_CONV1D_UPDATE,
            SSD_CHUNK_CUMSUM,
            SSD_CHUNK_STATE,
            SSD_STATE_PASSING,
            SSD_BMM_CHUNK,
            SSD_CHUNK_SCAN,
            MAMBA_CHUNK_SCAN_COMBINED,
            GDN_CHUNK_LOCAL_CUMSUM,
            GDN_CHUNK_SCALED_DOT_KKT,
            GDN_SOLVE_TRIL,
            GDN_RECOMPUTE_W_U,
            GDN_CHUNK_DELTA_H,
            GDN_CHUNK_O,
            CHUNK_GATED_DELTA_RULE,
            FUSED_RECURRENT_GATED_DELTA_RULE,
        )
    }
)


def get_spec(op: str) -> OpSpec:
    """The declaration of `op`, or an error that names the known ones."""
    if not isinstance(op, str):
        raise TypeError(f"op: expected a name as str, got {op!r} ({type(op).__name__})")
    if op not in SPECS:
        raise ValueError(f"op: got {op!r}, expected one of {tuple(SPECS)}")
    return SPECS[op]
