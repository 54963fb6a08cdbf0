"""The gated delta rule: its chunked form, that form's stages, and the decode step."""

from .chunk_delta_h import chunk_delta_h as chunk_delta_h
from .chunk_local_cumsum import chunk_local_cumsum as chunk_local_cumsum
from .chunk_o import chunk_o as chunk_o
from .chunk_scaled_dot_kkt import chunk_scaled_dot_kkt as chunk_scaled_dot_kkt
from .combined import chunk_gated_delta_rule as chunk_gated_delta_rule
from .recompute_w_u import recompute_w_u as recompute_w_u
from .recurrent import fused_recurrent_gated_delta_rule as fused_recurrent_gated_delta_rule
from .solve_tril import solve_tril as solve_tril

__all__ = [
    "chunk_delta_h",
    "chunk_gated_delta_rule",
    "chunk_local_cumsum",
    "chunk_o",
    "chunk_scaled_dot_kkt",
    "fused_recurrent_gated_delta_rule",
    "recompute_w_u",
    "solve_tril",
]
