"""The fourth stage of the chunked SSD scan: the products of a chunk's tokens, once for all heads of a group.

    CB[i, j] = C[i]·B[j]          i, j in the same chunk

The products are computed in the inputs' dtype and accumulated in fp32.

Source: mamba_ssm's operators of these names; Dao and Gu, Transformers are SSMs (2024).
"""

import jax

from ._dispatch import Implementation, prepare_stage, run


def bmm_chunk(
    C: jax.Array,
    B: jax.Array,
    *,
    chunk_size: int,
    cu_seqlens: jax.Array | None = None,
    precision: str = "ieee",
    implementation: Implementation | None = None,
) -> jax.Array:
    """[B,NC,G,L,L] in fp32, zero past a chunk's last token; what slots hold in which no chunk stands has no meaning.

    Sizes: B batch rows, T tokens, G groups, N dstate, L chunk_size, NC chunks of a batch row, or slots for those of all packed
    sequences, as in `chunk_cumsum`.

    Args:
        C: [B,T,G,N]; float32, bfloat16 or float16.
        B: [B,T,G,N] in C's dtype.
        chunk_size: a power of two from 16 to 2048.
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
        "bmm_chunk", C=C, B=B, chunk_size=chunk_size, cu_seqlens=cu_seqlens, precision=precision
    )  # fmt: skip
    return run(prepared, implementation)
