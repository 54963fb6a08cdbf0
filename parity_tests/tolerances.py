"""How far a result may lie from the float64 oracle, by operator and dtype, with the error that was measured beside it.

`relative` bounds ‖got - ref‖₂ / ‖ref‖₂, `worst` bounds max |got - ref| / max |ref|: the first sees a bias, the second one
wrong element among millions. Storing costs an element half a unit in the last place, at most 2^-8 of its value for bfloat16 and
2^-11 for float16 (about half of that over many); stochastic rounding costs a whole unit. Everything else is fp32.
"""

from typing import NamedTuple


class Tolerance(NamedTuple):
    relative: float
    worst: float
    measured: float
    """The largest `relative` over all cases, both twins, interpreters and H200."""


TOLERANCES: dict[tuple[str, str], Tolerance] = {
    ("selective_state_update", "float32"): Tolerance(1e-6, 3e-6, 1.1e-7),
    ("selective_state_update", "bfloat16"): Tolerance(2.4e-3, 4.0e-3, 1.9e-3),
    ("selective_state_update", "float16"): Tolerance(3.0e-4, 5.0e-4, 2.0e-4),
    ("selective_state_update", "bfloat16, stochastic"): Tolerance(4.8e-3, 8.0e-3, 1.4e-3),
    ("selective_state_update", "float16, stochastic"): Tolerance(6.0e-4, 1.0e-3, 2.8e-4),
    ("causal_conv1d", "float32"): Tolerance(1e-6, 3e-6, 1.0e-7),
    ("causal_conv1d", "bfloat16"): Tolerance(2.4e-3, 4.0e-3, 1.9e-3),
    ("causal_conv1d", "float16"): Tolerance(3.0e-4, 5.0e-4, 2.1e-4),
    ("causal_conv1d_update", "float32"): Tolerance(1e-6, 3e-6, 1.0e-7),
    ("causal_conv1d_update", "bfloat16"): Tolerance(2.4e-3, 4.0e-3, 1.9e-3),
    ("causal_conv1d_update", "float16"): Tolerance(3.0e-4, 5.0e-4, 2.1e-4),
    # The chunked scan: measured in the interpreters; at models' sizes on an H200 no more (2.3e-3 for bf16).
    ("ssd.chunk_cumsum", "float32"): Tolerance(1e-6, 3e-6, 1.3e-7),
    ("ssd.chunk_state", "float32"): Tolerance(1e-5, 3e-5, 4.8e-8),
    ("ssd.chunk_state", "bfloat16"): Tolerance(3e-3, 6e-3, 1.7e-3),
    ("ssd.chunk_state", "float16"): Tolerance(4e-4, 8e-4, 2.1e-4),
    ("ssd.state_passing", "float32"): Tolerance(1e-6, 3e-6, 4.0e-8),
    ("ssd.state_passing", "float16"): Tolerance(3e-4, 5e-4, 1.8e-4),
    ("ssd.bmm_chunk", "float32"): Tolerance(1e-5, 3e-5, 1.4e-7),
    ("ssd.chunk_scan", "float32"): Tolerance(1e-5, 3e-5, 8.7e-8),
    ("ssd.chunk_scan", "bfloat16"): Tolerance(5e-3, 1e-2, 2.3e-3),
    ("ssd.chunk_scan", "float16"): Tolerance(7e-4, 1.4e-3, 3.0e-4),
    ("mamba_chunk_scan_combined", "float32"): Tolerance(2e-5, 5e-5, 3.5e-7),
    ("mamba_chunk_scan_combined", "bfloat16"): Tolerance(6e-3, 1.2e-2, 2.4e-3),
    ("mamba_chunk_scan_combined", "float16"): Tolerance(1e-3, 2e-3, 2.9e-4),
    # The gated delta rule: measured in the interpreters, at models' sizes through XLA on a CPU.
    ("gdn.chunk_local_cumsum", "float32"): Tolerance(1e-6, 3e-6, 1.3e-7),
    ("gdn.chunk_scaled_dot_kkt", "float32"): Tolerance(1e-5, 3e-5, 1.4e-7),
    ("gdn.solve_tril", "float32"): Tolerance(1e-6, 4e-6, 1.3e-7),
    # Two roundings before a product (the inverse, beta·k or beta·v) and one after it.
    ("gdn.recompute_w_u", "float32"): Tolerance(1e-5, 3e-5, 6.3e-8),
    ("gdn.recompute_w_u", "bfloat16"): Tolerance(4e-3, 1.0e-2, 2.9e-3),
    ("gdn.recompute_w_u", "float16"): Tolerance(5e-4, 1.2e-3, 2.9e-4),
    ("gdn.chunk_delta_h", "float32"): Tolerance(1e-5, 3e-5, 9.6e-8),
    ("gdn.chunk_delta_h", "bfloat16"): Tolerance(4e-3, 8e-3, 2.3e-3),
    ("gdn.chunk_delta_h", "float16"): Tolerance(5e-4, 1e-3, 1.9e-4),
    ("gdn.chunk_o", "float32"): Tolerance(1e-5, 3e-5, 1.1e-7),
    ("gdn.chunk_o", "bfloat16"): Tolerance(4e-3, 8e-3, 2.0e-3),
    ("gdn.chunk_o", "float16"): Tolerance(5e-4, 1e-3, 2.5e-4),
    # Six roundings between k and o: normalised keys, the inverse and its factors, w and u, the state, v_new, o.
    ("chunk_gated_delta_rule", "float32"): Tolerance(1e-5, 3e-5, 2.4e-6),
    ("chunk_gated_delta_rule", "bfloat16"): Tolerance(8e-3, 2e-2, 4.4e-3),
    ("chunk_gated_delta_rule", "float16"): Tolerance(1e-3, 2.5e-3, 5.6e-4),
    # Every chunk's keys take back from the state what they read of it rounded, so its error does not average out as that of
    # SSD's does; but it settles (4096 tokens that are hardly forgotten are off by what 1024 are), for what a key found wrong
    # it also corrects. One rounding less than o.
    ("chunk_gated_delta_rule", "float32, state"): Tolerance(1e-5, 3e-5, 1.1e-6),
    ("chunk_gated_delta_rule", "bfloat16, state"): Tolerance(7e-3, 1.5e-2, 3.9e-3),
    ("chunk_gated_delta_rule", "float16, state"): Tolerance(1e-3, 2e-3, 6.1e-4),
    # Keys almost parallel, beta almost 1: o is a small difference of what u and w·S have in common, and that was rounded.
    ("chunk_gated_delta_rule", "bfloat16, resembling"): Tolerance(6e-2, 1.4e-1, 2.7e-2),
    ("chunk_gated_delta_rule", "float16, resembling"): Tolerance(8e-3, 1.8e-2, 3.9e-3),
    # Normalised q and k are rounded, and o.
    ("fused_recurrent_gated_delta_rule", "float32"): Tolerance(2e-6, 5e-6, 5.5e-7),
    ("fused_recurrent_gated_delta_rule", "bfloat16"): Tolerance(4e-3, 8e-3, 2.6e-3),
    ("fused_recurrent_gated_delta_rule", "float16"): Tolerance(5e-4, 1e-3, 2.3e-4),
}


def tolerance(op: str, dtype: str, stochastic: bool = False) -> Tolerance:
    return TOLERANCES[op, f"{dtype}, stochastic" if stochastic else dtype]
