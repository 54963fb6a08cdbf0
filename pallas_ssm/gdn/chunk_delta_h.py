"""The state from chunk to chunk:

    v_new = u - w · h        h' = exp(g_last) · h + k^T · (exp(g_last - g) · v_new)

with h the state before the chunk and g_last its last token's gate. The state is fp32 from chunk to chunk. Rounding points: h
to k's dtype for the product and where it is stored; v_new to u's dtype where it is stored; exp(g_last - g)·v_new, from the
fp32 v_new, to k's dtype for the product. Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024 (arXiv
2412.06464); FLA's `chunk_gated_delta_rule_fwd_h`.
"""

import jax

from ._dispatch import Implementation, Precision, prepare, run


def chunk_delta_h(
    k: jax.Array,
    w: jax.Array,
    u: jax.Array,
    *,
    g: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    chunk_size: int = 64,
    cu_seqlens: jax.Array | None = None,
    precision: Precision = "ieee",
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (h [B,NC,H_v,K,V] in k's dtype, v_new [B,T,H_v,V] in u's, final_state [N_seq,H_v,K,V] in fp32).

    NC is ceil(T / chunk_size), or, packed, T // chunk_size + N_seq slots, of which sequence n's chunk c has slot
    cu_seqlens[n] // chunk_size + n + c; what a slot without a chunk holds has no meaning. A sequence of no tokens keeps its
    state.

    Args:
        k: [B,T,H_k,K]; value head h reads key head h // (H_v // H_k).
        w: [B,T,H_v,K], u: [B,T,H_v,V], of `recompute_w_u` and of k's dtype.
        g: [B,T,H_v] fp32, cumulated within chunks (`chunk_local_cumsum`); no decay without it.
        initial_state: [N_seq,H_v,K,V]; zeros without it.
        precision: of fp32 products: "ieee", or "tf32" where the device has it.
        chunk_size, cu_seqlens, implementation: as in `chunk_local_cumsum`, as are gradients and errors.
    """
    prepared = prepare(
        "chunk_delta_h", k=k, w=w, u=u,
        g=g, initial_state=initial_state, chunk_size=chunk_size, cu_seqlens=cu_seqlens, precision=precision,
    )  # fmt: skip
    return run(prepared, implementation)
