"""The gate summed up within each chunk: out[t] = Σ g[s] over the tokens s <= t of t's chunk.

fp32 after the loads; no rounding point. Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024 (arXiv
2412.06464); FLA's operator of this name.
"""

import jax

from ._dispatch import Implementation, prepare, run


def chunk_local_cumsum(
    g: jax.Array,
    *,
    chunk_size: int = 64,
    cu_seqlens: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Returns [B,T,H_v] in fp32.

    Args:
        g: [B,T,H_v], the logarithm of each token's decay.
        chunk_size: 16, 32 or 64.
        cu_seqlens: [N_seq+1] int32 or int64, the bounds of packed sequences, with B == 1; may repeat. Every sequence's chunks
            begin at its own first token. Rows at or past cu_seqlens[-1] are zero. One compiled program serves every packing.
        implementation: "mosaic_gpu" (our kernel), "xla" (any device and shape), or None: the kernel where it takes the call,
            else XLA. `pallas_ssm.explain` tells which, and why.

    Differentiable in every float argument with every implementation, by `jax.grad` and `jax.vjp` (reverse mode); the backward
    pass is that of the XLA form. `jax.vmap` works with "xla", and None takes XLA under it; "mosaic_gpu" refuses it.

    Raises:
        ValueError, TypeError: before anything runs. Bounds in cu_seqlens that cannot be seen in time are clamped, and the
            first counts as 0.
        NotImplementedError: implementation="mosaic_gpu" where there is no kernel for the call or the device.
    """
    return run(prepare("chunk_local_cumsum", g=g, chunk_size=chunk_size, cu_seqlens=cu_seqlens), implementation)
