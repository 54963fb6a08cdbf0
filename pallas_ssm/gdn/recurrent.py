"""The gated delta rule token by token over a pool of states: decode.

    S = exp(g)·S          S = S + k ⊗ beta·(v - S^T·k)          o = scale · S^T · q

All arithmetic is fp32 after the loads, also the gate's and beta's where they are computed here. Rounding points: normalised q
and k, to their own dtype; o, to v's; the stored state, to the state's. o, and the next token of the same sequence, see the
fp32 state before that rounding.

Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024 (arXiv 2412.06464). Slots, packed sequences and speculative
decode are those of `selective_state_update`.
"""

import jax

from ._dispatch import Implementation
from ._recurrent_dispatch import prepare, run


def fused_recurrent_gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    scale: float | None = None,
    A_log: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    sigmoid_beta: bool = False,
    use_qk_l2norm: bool = False,
    state_indices: jax.Array | None = None,
    dst_state_indices: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    num_accepted_tokens: jax.Array | None = None,
    null_slot: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o, new_state): o of v's shape and dtype, the new pool of the state's.

    Donate the state (`jax.jit(..., donate_argnums=...)`) and it is updated in place: the compiled program then holds no
    copy of it. Without donation there is exactly one.

    Sizes: B tokens (T of them in N_seq sequences when packed), S slots, H_k query and key heads, H_v value heads, a multiple
    of H_k: value head h reads query and key head h // (H_v // H_k). Float arrays are float32, bfloat16 or float16; index
    arrays int32 or int64.

    Args:
        q, k: [B,H_k,K]; K up to 256.
        v: [B,H_v,V]; q, k and v have one dtype.
        g: [B,H_v], the natural log of the decay, of either sign; with A_log the raw gate, from which it is computed.
        beta: [B,H_v]; never rounded.
        state: [S,H_v,K,V], the pool.
        scale: K^-0.5 by default.
        A_log: [H_v]; the log of the decay is then -exp(A_log)·softplus(g + dt_bias).
        dt_bias: [H_v]; only with A_log.
        sigmoid_beta: beta is sigmoid(beta).
        use_qk_l2norm: x·rsqrt(Σ x^2 + 1e-6) of every query and key first.
        state_indices: [B] (or [N_seq]), the slot each sequence starts from; slot n for sequence n without it. A slot < 0 is
            padding: its rows of o are zero and no state is read or written. Two sequences of one call must not write the same
            slot, nor one read what another writes: which comes first is not defined.
            With num_accepted_tokens: [N_seq,T_max], a slot for every token.
        dst_state_indices: the same shape; the slot to write, by default the one that was read. Padding here means that o is
            computed and the state dropped.
        cu_seqlens: [N_seq+1], the bounds of packed sequences; may repeat (a sequence of no tokens leaves its state alone).
            Rows of o at or past cu_seqlens[-1] are zero.
        num_accepted_tokens: [N_seq], speculative decode: sequence n starts from the state after its
            num_accepted_tokens[n]-th token of the last step, state_indices[n, num_accepted_tokens[n] - 1] with the column
            clamped to [0, T_max - 1], and the state after each token t < T_max is stored to its own slot
            dst_state_indices[n, t].
        null_slot: one more slot number that means padding (vLLM's block 0).
        implementation: "mosaic_gpu" (our kernel), "xla" (any device and shape), or None: the kernel where it takes the call,
            else XLA. `pallas_ssm.explain` tells which, and why.

    Differentiable in every float argument, by `jax.grad` and `jax.vjp` (reverse mode): the backward pass is that of a scan in
    XLA, which keeps the state after every token, [T,H_v,K,V] in fp32. Rounding of the stored state counts as the identity.

    Raises:
        ValueError, TypeError: before anything runs. Under `jax.jit`, and for indices that are on a GPU, a slot >= S cannot be
            seen in time: its rows of o are NaN and no state is touched; bounds in cu_seqlens are clamped.
        NotImplementedError: implementation="mosaic_gpu" where there is no kernel for the call or the device.
    """
    prepared = prepare(
        q, k, v, g, beta, state,
        scale=scale, A_log=A_log, dt_bias=dt_bias, sigmoid_beta=sigmoid_beta, use_qk_l2norm=use_qk_l2norm,
        state_indices=state_indices, dst_state_indices=dst_state_indices, cu_seqlens=cu_seqlens,
        num_accepted_tokens=num_accepted_tokens, null_slot=null_slot,
    )  # fmt: skip
    return run(prepared, implementation)
