"""The last stage of the chunked SSD scan: y from the state before each chunk and the products within it.

    y[i] = exp(dA_cumsum[i])·(S·C[i]) + Σ_{j <= i} M[i, j]·x[j] + D·x[i], then · silu(z[i])
    M[i, j] = CB[i, j]·exp(min(dA_cumsum[i] - dA_cumsum[j], 0))·dt[j]

S is rounded to C's dtype and M to x's for the products, which are accumulated in fp32, as everything else is computed; y is
rounded once.

Source: mamba_ssm's operators of these names; Dao and Gu, Transformers are SSMs (2024).
"""

import jax

from ._dispatch import Implementation, prepare_stage, run


def chunk_scan(
    CB: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    dA_cumsum: jax.Array,
    C: jax.Array,
    states: jax.Array,
    *,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    precision: str = "ieee",
    implementation: Implementation | None = None,
) -> jax.Array:
    """y [B,T,H,P] in x's dtype; rows at or past cu_seqlens[-1] are zero.

    Sizes: as in `chunk_state`.

    Args:
        CB: [B,NC,G,L,L] in fp32, of `bmm_chunk`.
        x: [B,T,H,P]; float32, bfloat16 or float16.
        dt, dA_cumsum: [B,H,NC,L] in fp32, of `chunk_cumsum`.
        C: [B,T,G,N] in x's dtype.
        states: [B,NC,H,P,N], the state before each chunk, of `state_passing`; float32, bfloat16 or float16.
        D: [H] or [H,P], the skip.
        z: [B,T,H,P], the gate; in x's dtype.
        cu_seqlens: [N_seq+1], the bounds of packed sequences; then B = 1. They may repeat.
        precision: "ieee" or "tf32", how fp32 inputs are multiplied.
        implementation: "mosaic_gpu" (our kernel; on a CPU under `plgpu.force_gpu_interpret_mode`), "xla" (any device and
            shape), or None: the kernel where it takes the call, else XLA. `pallas_ssm.explain` tells which, and why.

    Differentiable in every float argument with either implementation; the backward pass is that of the XLA form. `jax.vmap`
    works with "xla", and None takes XLA under it; "mosaic_gpu" refuses it.

    Raises:
        ValueError, TypeError: before anything runs. Under `jax.jit`, and for bounds that are on a GPU, those out of range
            are clamped, and the first counts as 0.
        NotImplementedError: implementation="mosaic_gpu" where the kernel does not take the shape or the device.
    """
    prepared = prepare_stage(
        "chunk_scan", CB=CB, x=x, dt=dt, dA_cumsum=dA_cumsum, C=C, states=states, D=D, z=z, cu_seqlens=cu_seqlens,
        precision=precision,
    )  # fmt: skip
    return run(prepared, implementation)
