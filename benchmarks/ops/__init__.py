"""The operators that are benchmarked: one module, one declaration each."""

from ..op import BenchOp
from .causal_conv1d import CAUSAL_CONV1D
from .causal_conv1d_update import CAUSAL_CONV1D_UPDATE
from .chunk_gated_delta_rule import CHUNK_GATED_DELTA_RULE
from .fused_recurrent_gated_delta_rule import FUSED_RECURRENT_GATED_DELTA_RULE
from .gdn_chunk_o import GDN_CHUNK_O
from .mamba_chunk_scan_combined import MAMBA_CHUNK_SCAN_COMBINED
from .selective_state_update import SELECTIVE_STATE_UPDATE

OPS: dict[str, BenchOp] = {
    op.name: op
    for op in (
        SELECTIVE_STATE_UPDATE,
        CAUSAL_CONV1D,
        CAUSAL_CONV1D_UPDATE,
        MAMBA_CHUNK_SCAN_COMBINED,
        CHUNK_GATED_DELTA_RULE,
        GDN_CHUNK_O,
        FUSED_RECURRENT_GATED_DELTA_RULE,
    )
}
