"""Decode with the short depthwise causal convolution: a few tokens onto the state of each sequence.

    y[t] = act(bias + Σ_j weight[:, j] · x[t - (W - 1) + j])        j = 0 … W - 1

where x[-1], x[-2], … are the last inputs that the sequence's slot holds, which becomes the last inputs again. Arithmetic,
rounding point and source are those of `causal_conv1d`.
"""

import jax

from ._causal_conv1d_dispatch import Activation, Implementation, prepare_update, run


def causal_conv1d_update(
    x: jax.Array,
    conv_state: jax.Array,
    weight: jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    conv_state_indices: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    num_accepted_tokens: jax.Array | None = None,
    null_slot: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A few tokens onto each sequence's state: (y, new_conv_state), y of x's shape and dtype.

    Donate conv_state and it is updated in place, as in `causal_conv1d`, whose sizes and dtypes these are.

    Args:
        x: [T,D]: one token for each of N_seq = T sequences, unless packed.
        conv_state: [S,L,D] with L >= W-1, the pool. A sequence's last W-1 inputs are the first rows of its slot.
        weight: [D,W].
        bias: [D].
        activation: None, or "silu", of which "swish" is another name.
        conv_state_indices: [N_seq], the slot of each sequence; slot n for sequence n without it. A slot < 0 is padding: its
            rows of y are zero and no state is read or written. Two sequences of one call must not share a slot.
        cu_seqlens: [N_seq+1], the bounds of packed sequences; may repeat (a sequence of no tokens leaves its state alone).
            Rows of y at or past cu_seqlens[-1] are zero.
        num_accepted_tokens: [N_seq], speculative decode: the last call left W-2 older rows and then its tokens, of which the
            first a = num_accepted_tokens[n] were accepted (clamped to 1 … L-W+2), so the sequence goes on from rows a-1 …
            a+W-3. This call leaves those without their first, then its own tokens as far as the slot has rows.
        null_slot: one more slot number that means padding (vLLM's block 0).
        implementation: as for `causal_conv1d`, and so are gradients and errors.
    """
    prepared = prepare_update(
        x, conv_state, weight, bias=bias, activation=activation, conv_state_indices=conv_state_indices,
        cu_seqlens=cu_seqlens, num_accepted_tokens=num_accepted_tokens, null_slot=null_slot,
    )  # fmt: skip
    return run(prepared, implementation)
