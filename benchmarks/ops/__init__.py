"""The operators that are benchmarked: one module, one declaration each."""

from ..op import BenchOp
from .causal_conv1d import CAUSAL_CONV1D
from .causal_conv1d_update import CAUSAL_CONV1D_UPDATE
from .mamba_chunk_scan_combined import MAMBA_CHUNK_SCAN_COMBINED
from .selective_state_update import SELECTIVE_STATE_UPDATE

OPS: dict[str, BenchOp] = {
    op.name: op for op in (SELECTIVE_STATE_UPDATE, CAUSAL_CONV1D, CAUSAL_CONV1D_UPDATE, MAMBA_CHUNK_SCAN_COMBINED)
}
