"""The second stage of the chunked SSD scan: the state that each chunk leaves when it starts from zero.

    states[c] = Σ_t (x[t]·dt[t]·exp(min(dA_cumsum[last] - dA_cumsum[t], 0))) ⊗ B[t]       t in chunk c

The weighted x is rounded to x's dtype for the product, which is accumulated in fp32.

Source: mamba_ssm's operators of these names; Dao and Gu, Transformers are SSMs (2024).
"""

import jax

from ._dispatch import Implementation, prepare_stage, run


def chunk_state(
    x: jax.Array,
    B: jax.Array,
    dt: jax.Array,
    dA_cumsum: jax.Array,
    *,
    cu_seqlens: jax.Array | None = None,
    precision: str = "ieee",
    implementation: Implementation | None = None,
) -> jax.Array:
    """[B,NC,H,P,N] in fp32; what slots hold in which no chunk stands has no meaning.

    Sizes: B batch rows, T tokens, H heads, G groups (H % G == 0), P headdim, N dstate, L chunk size, NC chunks of a batch row,
    or slots for those of all packed sequences, as in `chunk_cumsum`.

    Args:
        x: [B,T,H,P]; float32, bfloat16 or float16.
        B: [B,T,G,N] in x's dtype.
        dt, dA_cumsum: [B,H,NC,L] in fp32, of `chunk_cumsum`.
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
        "chunk_state", x=x, B=B, dt=dt, dA_cumsum=dA_cumsum, cu_seqlens=cu_seqlens, precision=precision
    )  # fmt: skip
    return run(prepared, implementation)
