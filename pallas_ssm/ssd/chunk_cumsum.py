"""The first stage of the chunked SSD scan: every chunk's steps, and the log of its decay up to each token.

    dt[t] = clip(softplus(dt[t] + dt_bias), dt_limit)          dA_cumsum[t] = Σ_{s <= t} dt[s]·A      within a chunk

softplus and bias where asked for, all in fp32. Past a chunk's last token dt is 0, so that its last entry is its total.

Source: mamba_ssm's operators of these names; Dao and Gu, Transformers are SSMs (2024).
"""

import jax

from ._dispatch import Implementation, prepare_stage, run


def chunk_cumsum(
    dt: jax.Array,
    A: jax.Array,
    *,
    chunk_size: int,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    cu_seqlens: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(dA_cumsum, dt), each [B,H,NC,L] in fp32.

    Sizes: B batch rows, T tokens, H heads, L chunk_size, NC chunks of a batch row: ceil(T / L). Packed, sequence n's chunk c is
    in slot cu_seqlens[n] // L + n + c of NC = T // L + N_seq, and what slots hold in which no chunk stands has no meaning.
    Float arrays are float32, bfloat16 or float16, each on its own; cu_seqlens is int32 or int64.

    Args:
        dt: [B,T,H].
        A: [H]; negative.
        chunk_size: a power of two from 16 to 2048.
        dt_bias: [H].
        dt_softplus: softplus after the bias. It keeps the low bits of very negative steps.
        dt_limit: (low, high), 0 <= low <= high: the range that dt is clipped to at the end.
        cu_seqlens: [N_seq+1], the bounds of packed sequences; then B = 1. They may repeat.
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
        "chunk_cumsum", dt=dt, A=A, chunk_size=chunk_size, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return run(prepared, implementation)
