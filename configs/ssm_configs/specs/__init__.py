"""The operators that have tuning tables: one module, one declaration each."""

from collections.abc import Mapping
from types import MappingProxyType

from ..spec import OpSpec
from .causal_conv1d import CAUSAL_CONV1D
from .causal_conv1d_update import CAUSAL_CONV1D_UPDATE
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
