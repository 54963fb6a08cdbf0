"""Mamba-2's chunked scan: its five stages, each an operator of its own, and the whole."""

from .bmm_chunk import bmm_chunk as bmm_chunk
from .chunk_cumsum import chunk_cumsum as chunk_cumsum
from .chunk_scan import chunk_scan as chunk_scan
from .chunk_state import chunk_state as chunk_state
from .combined import mamba_chunk_scan_combined as mamba_chunk_scan_combined
from .state_passing import state_passing as state_passing

__all__ = [
    "bmm_chunk",
    "chunk_cumsum",
    "chunk_scan",
    "chunk_state",
    "mamba_chunk_scan_combined",
    "state_passing",
]
