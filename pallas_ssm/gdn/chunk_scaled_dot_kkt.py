"""The strictly lower triangles that the delta rule inverts: A[i,j] = beta_i · (k_i · k_j) · exp(g_i - g_j), j < i of a chunk.

Rounding points: none but the products' own, of operands in k's dtype, summed in fp32. g may be of either sign, and is masked
before the exp. Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024 (arXiv 2412.06464); FLA's operator of this
name.
"""

import jax

from ._dispatch import Implementation, Precision, prepare, run


def chunk_scaled_dot_kkt(
    k: jax.Array,
    beta: jax.Array,
    *,
    g: jax.Array | None = None,
    chunk_size: int = 64,
    cu_seqlens: jax.Array | None = None,
    precision: Precision = "ieee",
    implementation: Implementation | None = None,
) -> jax.Array:
    """Returns A [B,T,H_v,BT] in fp32, BT = chunk_size: row i of a chunk holds its columns, zero on the diagonal and after.

    Args:
        k: [B,T,H_k,K]; value head h reads key head h // (H_v // H_k).
        beta: [B,T,H_v], never rounded below fp32.
        g: [B,T,H_v] fp32, cumulated within chunks (`chunk_local_cumsum`); no decay without it.
        precision: of fp32 products: "ieee", or "tf32" where the device has it.
        chunk_size, cu_seqlens, implementation: as in `chunk_local_cumsum`, as are gradients and errors.
    """
    prepared = prepare(
        "chunk_scaled_dot_kkt", k=k, beta=beta, g=g, chunk_size=chunk_size, cu_seqlens=cu_seqlens, precision=precision
    )
    return run(prepared, implementation)
