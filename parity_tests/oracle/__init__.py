"""The definitions: every operator as a plain NumPy float64 recurrence, written for reading and not for speed."""

from . import ssd as ssd
from .causal_conv1d import causal_conv1d as causal_conv1d
from .causal_conv1d import causal_conv1d_split as causal_conv1d_split
from .causal_conv1d import causal_conv1d_update as causal_conv1d_update
from .selective_state_update import selective_state_update as selective_state_update
from .ssd import mamba_chunk_scan_by_stages as mamba_chunk_scan_by_stages
from .ssd import mamba_chunk_scan_combined as mamba_chunk_scan_combined
