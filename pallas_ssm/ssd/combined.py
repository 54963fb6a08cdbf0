"""The chunked scan of a Mamba-2 layer, whole: prompts and training forward.

    S[t] = exp(dt[t]·A)·S[t-1] + dt[t]·x[t] ⊗ B[t]          y[t] = S[t]·C[t] + D·x[t], then · silu(z[t])

dt is clip(softplus(dt + dt_bias), dt_limit), bias and softplus where asked for, in fp32. All decays and sums are fp32. Four
products run on tensor cores in x's dtype, and what is rounded to it for them is: S before a chunk, for S·C; C·B^T ∘ decay ∘ dt,
for the chunk's own tokens; x·dt·decay, for the state the chunk leaves. y is rounded once.

Source: mamba_ssm's operator of this name; Dao and Gu, Transformers are SSMs (2024).
"""

import jax
import jax.numpy as jnp

from ._dispatch import Implementation, prepare_combined, run


def mamba_chunk_scan_combined(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    chunk_size: int,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    state_dtype: jax.typing.DTypeLike = jnp.float32,
    return_final_states: bool = False,
    return_intermediate_states: bool = False,
    chunk_aligned: bool = False,
    precision: str = "ieee",
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None] | tuple[jax.Array, jax.Array | None, jax.Array]:
    """(y, final), or (y, final, intermediate): y [B,T,H,P] in x's dtype; final, the last states [N_seq,H,P,N], or None;
    intermediate, the state after each of the caller's chunks [B,NC,H,P,N].

    Sizes: B batch rows, T tokens, H heads, G groups (H % G == 0), P headdim, N dstate, N_seq sequences (B of them unless
    packed), L chunk_size, NC chunks of a batch row: ceil(T / L). Packed, sequence n's chunk c is in slot
    cu_seqlens[n] // L + n + c of NC = T // L + N_seq, and what slots hold in which no chunk stands has no meaning.
    Float arrays are float32, bfloat16 or float16, on their own but for x, B, C and z, which have one dtype; cu_seqlens is int32
    or int64.

    Args:
        x: [B,T,H,P].
        dt: [B,T,H].
        A: [H]; negative.
        B, C: [B,T,G,N].
        chunk_size: a power of two from 16 to 2048: where intermediate states are taken and aligned sequences begin. What the
            implementations work by is theirs.
        D: [H] or [H,P], the skip.
        z: [B,T,H,P], the gate.
        dt_bias: [H].
        dt_softplus: softplus after the bias. It keeps the low bits of very negative steps.
        dt_limit: (low, high), 0 <= low <= high: the range that dt is clipped to at the end.
        initial_states: [N_seq,H,P,N].
        cu_seqlens: [N_seq+1], the bounds of packed sequences; then B = 1. They may repeat: a sequence without tokens ends
            in its initial state. Rows of y at or past cu_seqlens[-1] are zero. One compiled program serves every packing.
        state_dtype: of the states that are returned.
        return_final_states: whether to return the last states.
        return_intermediate_states: whether to return the state after each chunk.
        chunk_aligned: x, B and C have rows in which every sequence begins at a multiple of L, as `causal_conv1d_split` writes
            them: [B, L·NC, …]. dt, z and y have T rows as ever.
        precision: "ieee" or "tf32", how fp32 inputs are multiplied.
        implementation: "mosaic_gpu" (our kernel; on a CPU under `plgpu.force_gpu_interpret_mode`), "xla" (any device and
            shape), or None: the kernel where it takes the call, else XLA. `pallas_ssm.explain` tells which, and why.

    Differentiable in every float argument with either implementation, in reverse mode; the backward pass is that of the XLA
    form. `jax.vmap` works with "xla", and None takes XLA under it; "mosaic_gpu" refuses it.

    Raises:
        ValueError, TypeError: before anything runs. Under `jax.jit`, and for bounds that are on a GPU, those out of range
            are clamped, and the first counts as 0.
        NotImplementedError: implementation="mosaic_gpu" where the kernel does not take the shape or the device.
    """
    prepared = prepare_combined(
        x=x, dt=dt, A=A, B=B, C=C, chunk_size=chunk_size, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
        dt_limit=dt_limit, initial_states=initial_states, cu_seqlens=cu_seqlens, state_dtype=state_dtype,
        return_final_states=return_final_states, return_intermediate_states=return_intermediate_states,
        chunk_aligned=chunk_aligned, precision=precision,
    )  # fmt: skip
    results = run(prepared, implementation)
    if return_intermediate_states:
        return results.y, results.final, results.intermediate
    return results.y, results.final
