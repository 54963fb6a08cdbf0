"""The third stage of the chunked SSD scan: the recurrence over chunks.

    S[c + 1] = exp(dA_cumsum[c, last])·S[c] + states[c]          S[0] = the initial state, or zeros

S is carried in fp32; what is returned is rounded to state_dtype.

Source: mamba_ssm's operators of these names; Dao and Gu, Transformers are SSMs (2024).
"""

import jax
import jax.numpy as jnp

from ._dispatch import Implementation, prepare_stage, run


def state_passing(
    states: jax.Array,
    dA_cumsum: jax.Array,
    *,
    initial_states: jax.Array | None = None,
    state_dtype: jax.typing.DTypeLike = jnp.float32,
    cu_seqlens: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(the state before each chunk [B,NC,H,P,N], the last state of each sequence [N_seq,H,P,N]), in state_dtype.

    Sizes: as in `chunk_state`. What slots hold in which no chunk stands has no meaning.

    Args:
        states: [B,NC,H,P,N] in fp32, of `chunk_state`.
        dA_cumsum: [B,H,NC,L] in fp32, of `chunk_cumsum`; only its last entries are read.
        initial_states: [N_seq,H,P,N]; float32, bfloat16 or float16.
        state_dtype: float32, bfloat16 or float16.
        cu_seqlens: [N_seq+1], the bounds of packed sequences; then B = 1. They may repeat: a sequence without tokens ends
            in its initial state.
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
        "state_passing", states=states, dA_cumsum=dA_cumsum, initial_states=initial_states, state_dtype=state_dtype,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return run(prepared, implementation)
