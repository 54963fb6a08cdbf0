"""What each token adds to its chunk, as if the chunk began without a state, and what it takes from the state it meets:

    u = A · (beta · v)        w = A · (beta · exp(g) · k)        A the inverse of `solve_tril`

Rounding points: A, beta·exp(g)·k and beta·v to k's dtype; w and u, summed in fp32, to k's dtype. Source: Yang, Kautz and
Hatamizadeh, "Gated Delta Networks", 2024 (arXiv 2412.06464); FLA's operator of this name.
"""

import jax

from ._dispatch import Implementation, Precision, prepare, run


def recompute_w_u(
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    A: jax.Array,
    *,
    g: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    precision: Precision = "ieee",
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (w [B,T,H_v,K], u [B,T,H_v,V]), both in k's dtype.

    Args:
        k: [B,T,H_k,K]; value head h reads key head h // (H_v // H_k).
        v: [B,T,H_v,V], of k's dtype.
        beta: [B,T,H_v], never rounded below fp32.
        A: [B,T,H_v,BT], the inverse; BT 16, 32 or 64 is the chunk size.
        g: [B,T,H_v] fp32, cumulated within chunks (`chunk_local_cumsum`); no decay without it.
        precision: of fp32 products: "ieee", or "tf32" where the device has it.
        cu_seqlens, implementation: as in `chunk_local_cumsum`, as are gradients and errors.
    """
    prepared = prepare("recompute_w_u", k=k, v=v, beta=beta, A=A, g=g, cu_seqlens=cu_seqlens, precision=precision)
    return run(prepared, implementation)
