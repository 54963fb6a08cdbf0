"""The gated delta rule over whole sequences:

    S[t] = exp(g[t])·S[t-1] + k[t] ⊗ beta[t]·(v[t] - (exp(g[t])·S[t-1])^T·k[t])          o[t] = scale · S[t]^T · q[t]

by chunks: between them the state is fp32, and nothing within one is done token by token.

The XLA form goes stage by stage, as this package has them, and its rounding points are theirs. The kernels, with A the matrix
of `chunk_scaled_dot_kkt`, P that of `chunk_o`'s products within a chunk, h the state before it, G the gate cumulated within
it, and x and y the factors that make norms of q and k one:

    X   = (I + A)^-1·diag(beta)    PX = P·X    Y = (diag(d)·X)^T·k, d_i = y_i·exp(G_last - G_i)
    r_i = v_i - y_i·exp(G_i)·h^T k_i
    o_i = scale·x_i·exp(G_i)·h^T q_i + Σ_j PX_ij·r_j          h <- exp(G_last)·h + Y^T·r

They round to q's dtype: P; X and diag(d)·X; PX and Y; h and r; o once.

Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024 (arXiv 2412.06464); FLA's operator of this name.
"""

import jax

from ._dispatch import Implementation, Precision, prepare, run


def chunk_gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    use_qk_l2norm: bool = False,
    chunk_size: int = 64,
    return_final_state: bool = False,
    precision: Precision = "ieee",
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns (o, final_state): o [B,T,H_v,V] in v's dtype; the states after each sequence, [N_seq,H_v,K,V] in fp32, or None.

    Sizes: B batch, T tokens, H_k query and key heads, H_v value heads (a multiple of H_k: value head h reads key head
    h // (H_v // H_k)), N_seq sequences (B of them unless packed). Float arrays are float32, bfloat16 or float16: q, k and v of
    one dtype, the others each on its own. Index arrays are int32 or int64.

    Args:
        q, k: [B,T,H_k,K], K <= 256.
        v: [B,T,H_v,V].
        g: [B,T,H_v], the natural logarithm of each token's decay.
        beta: [B,T,H_v], how much of v a token writes; never rounded below fp32.
        scale: K^-0.5 by default.
        initial_state: [N_seq,H_v,K,V]; zeros without it.
        cu_seqlens: [N_seq+1], the bounds of packed sequences, with B == 1; may repeat (a sequence of no tokens keeps its
            state). Rows of o at or past cu_seqlens[-1] are zero. One compiled program serves every packing.
        use_qk_l2norm: q and k divided by their norms, x·rsqrt(Σ x^2 + 1e-6) in fp32, and rounded to their dtype.
        chunk_size: 16, 32 or 64 tokens at a time. Nothing but rounding depends on it; XLA's form takes twice as many where
            sequences are, by T and N_seq, that long.
        precision: of fp32 products: "ieee", or "tf32" where the device has it.
        implementation: "mosaic_gpu" (our kernels), "xla" (any device and shape), or None: the kernels where they take the
            call, else XLA. `pallas_ssm.explain` tells which, and why.

    Differentiable in every float argument with every implementation, by `jax.grad` and `jax.vjp` (reverse mode); the backward
    pass is that of the XLA form, which keeps the inverses, w, u and v_new of all chunks and the fp32 state before each.
    `jax.vmap` works with "xla", and None takes XLA under it; "mosaic_gpu" refuses it.

    Raises:
        ValueError, TypeError: before anything runs. Bounds in cu_seqlens that cannot be seen in time are clamped, and the
            first counts as 0.
        NotImplementedError: implementation="mosaic_gpu" where there is no kernel for the call or the device.
    """
    prepared = prepare(
        "chunk_gated_delta_rule", q=q, k=k, v=v, g=g, beta=beta,
        scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, use_qk_l2norm=use_qk_l2norm,
        chunk_size=chunk_size, return_final_state=return_final_state, precision=precision,
    )  # fmt: skip
    return run(prepared, implementation)
