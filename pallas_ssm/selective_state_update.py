"""One decode step of Mamba-2's recurrence over a pool of states.

    dt'   = softplus(dt + dt_bias)                  (each part where it is asked for)
    state = state · exp(A · dt') + (dt' · x) ⊗ B
    y     = (Σ_N state · C + D · x) · z · sigmoid(z)  (each part where it is given)

All arithmetic is fp32 after the loads. Rounding points: y to x's dtype; the stored state to the state's dtype. y, and the
next token of the same sequence, see the fp32 state before that rounding.

Source: Dao and Gu, "Transformers are SSMs", 2024 (arXiv 2405.21060). Slots, packed sequences and speculative decode follow
vLLM's operator of this name, except that padding rows give zeros and every index is bounded before it is used.
"""

from typing import Literal

import jax

from ._selective_state_update_dispatch import choose, prepare
from ._selective_state_update_vjp import call

Implementation = Literal["mosaic_gpu", "xla"]


def selective_state_update(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = False,
    state_batch_indices: jax.Array | None = None,
    dst_state_batch_indices: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    num_accepted_tokens: jax.Array | None = None,
    null_slot: int | None = None,
    rounding_seed: int | jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (y, new_state): y of x's shape and dtype, the new pool of the state's.

    Donate the state (`jax.jit(..., donate_argnums=...)`) and it is updated in place: the compiled program then holds no
    copy of it. Without donation there is exactly one.

    Sizes: T tokens (B of them, one for each of N_seq = B sequences, unless packed), S slots, H heads, G groups
    (H % G == 0), P headdim, N dstate. Float arrays are float32, bfloat16 or float16, each on its own; index arrays are
    int32 or int64.

    Args:
        state: [S,H,P,N], the pool.
            A head-less call leaves the H axis out of every argument and the G axis out of B and C: state [S,P,N].
        x: [T,H,P].
        dt: [T,H], or [T,H,P] when every row of headdim has a step of its own.
        A: [H], or [H,P,N]; negative.
        B, C: [T,G,N].
        D: [H] or [H,P], the skip.
        z: [T,H,P], the gate.
        dt_bias: [H] or [H,P].
        dt_softplus: softplus after the bias. It keeps the low bits of very negative steps.
        state_batch_indices: [N_seq], the slot each sequence starts from; slot n for sequence n without it. A slot < 0 is
            padding: its rows of y are zero and no state is read or written. Two sequences of one call must not write the
            same slot, nor one read what another writes: which comes first is not defined.
            With num_accepted_tokens: [N_seq,T_max], a slot for every token.
        dst_state_batch_indices: the same shape; the slot to write, by default the one that was read. Padding here means
            that y is computed and the state dropped.
        cu_seqlens: [N_seq+1], the bounds of packed sequences; may repeat (a sequence of no tokens leaves its state alone).
            Rows of y at or past cu_seqlens[-1] are zero.
        num_accepted_tokens: [N_seq], speculative decode: sequence n starts from the state after its
            num_accepted_tokens[n]-th token of the last step, state_batch_indices[n, num_accepted_tokens[n] - 1] with the
            column clamped to [0, T_max - 1], and the state after each token t < T_max is stored to its own slot
            dst_state_batch_indices[n, t].
        null_slot: one more slot number that means padding (vLLM's block 0).
        rounding_seed: store a 16-bit state with stochastic rounding: Philox-4x32-10 keyed by the seed (an int, or an
            integer scalar that may be traced), counted by the element's place in the pool, so the same seed gives the same
            bits whatever the launch and the implementation, and the bits of `triton_ssm`.
        implementation: "mosaic_gpu" (our kernel; on a CPU under `plgpu.force_gpu_interpret_mode`), "xla" (any device and
            shape), or None: the kernel where it takes the call, else XLA. `pallas_ssm.explain` tells which, and why.

    Differentiable in every float argument with either implementation, by `jax.grad` and `jax.vjp` (reverse mode): the
    backward pass is that of a scan in XLA, which keeps the state after every token, [T,H,P,N] in fp32. Rounding of the
    stored state, stochastic or not, counts as the identity. `jax.vmap` works with "xla", and None takes XLA under it;
    "mosaic_gpu" refuses it.

    Raises:
        ValueError, TypeError: before anything runs. Under `jax.jit`, and for indices that are on a GPU, a slot >= S cannot
            be seen in time: its rows of y are NaN and no state is touched; bounds in cu_seqlens are clamped.
        NotImplementedError: implementation="mosaic_gpu" where the kernel does not take the shape or the device.
    """
    prepared = prepare(
        state, x, dt, A, B, C,
        D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, state_batch_indices=state_batch_indices,
        dst_state_batch_indices=dst_state_batch_indices, cu_seqlens=cu_seqlens,
        num_accepted_tokens=num_accepted_tokens, null_slot=null_slot, rounding_seed=rounding_seed,
    )  # fmt: skip
    choice = choose(prepared, implementation)
    return call(prepared, choice.launch, batched_by_xla=implementation is None)
