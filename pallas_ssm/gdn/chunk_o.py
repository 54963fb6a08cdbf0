"""The output of each chunk, from the state before it and its own tokens:

    o_i = scale · (exp(g_i) · h^T · q_i + Σ_{j<=i} (q_i · k_j) · exp(g_i - g_j) · v_j)

Rounding points: (q_i·k_j)·exp(g_i - g_j), fp32 until then, to v's dtype; h to q's dtype; o, summed in fp32, to v's. g may be
of either sign, and is masked before the exp. Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024 (arXiv
2412.06464); FLA's `chunk_fwd_o`.
"""

from typing import Literal

import jax

from ._dispatch import Implementation, Precision, prepare, run


def chunk_o(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    h: jax.Array,
    *,
    g: jax.Array | None = None,
    gate_base: Literal["e", "2"] = "e",
    scale: float | None = None,
    chunk_size: int = 64,
    state_layout: Literal["KV", "VK"] = "KV",
    cu_seqlens: jax.Array | None = None,
    precision: Precision = "ieee",
    implementation: Implementation | None = None,
) -> jax.Array:
    """Returns o [B,T,H_v,V] in v's dtype.

    Args:
        q, k: [B,T,H_k,K]; value head h reads query and key head h // (H_v // H_k).
        v: [B,T,H_v,V], the v_new of `chunk_delta_h`, of q's dtype.
        h: [B,NC,H_v,K,V], the state before each chunk, in the slots of `chunk_delta_h`; any float dtype.
        g: [B,T,H_v] fp32, cumulated within chunks (`chunk_local_cumsum`); no decay without it.
        gate_base: "2" for a g that is a logarithm to base 2, and 2^g in place of exp(g).
        scale: K^-0.5 by default.
        state_layout: "VK" for h [B,NC,H_v,V,K].
        precision: of fp32 products: "ieee", or "tf32" where the device has it.
        chunk_size, cu_seqlens, implementation: as in `chunk_local_cumsum`, as are gradients and errors.
    """
    prepared = prepare(
        "chunk_o", q=q, k=k, v=v, h=h,
        g=g, gate_base=gate_base, scale=scale, chunk_size=chunk_size, state_layout=state_layout, cu_seqlens=cu_seqlens,
        precision=precision,
    )  # fmt: skip
    return run(prepared, implementation)
