"""The short depthwise causal convolution before every Mamba-2 and gated-delta-net layer.

    y[t] = act(bias + Σ_j weight[:, j] · x[t - (W - 1) + j])        j = 0 … W - 1

where x[-1], x[-2], … of a sequence are the inputs before it: its initial state's last rows, or zeros. All arithmetic is
fp32 after the loads, the sum in the order of j from the bias on; silu(v) = v / (1 + exp2(-v · log2 e)). Rounding point: y to
x's dtype. The state that comes out is the last W - 1 inputs, copied bit for bit.

Source: the causal-conv1d library of Dao. Slots, packed sequences and speculative decode follow vLLM's operators of these
names, except that padding rows give zeros and every index is bounded before it is used.
"""

from collections.abc import Sequence

import jax

from ._causal_conv1d_dispatch import Activation, Implementation, prepare_prefill, run


def causal_conv1d(
    x: jax.Array,
    weight: jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    initial_state: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    conv_state: jax.Array | None = None,
    state_indices: jax.Array | None = None,
    has_initial_state: jax.Array | None = None,
    null_slot: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (y, final_state): y of x's shape and dtype; final_state [N_seq,W-1,D], or with conv_state the new pool.

    Donate the pool (`jax.jit(..., donate_argnums=...)`) and it is updated in place: the compiled program then holds no copy
    of it. Without donation there is exactly one.

    Sizes: B batch, T tokens, D channels, W width (2 to 6), N_seq sequences (B of them unless packed), S slots. Float arrays
    are float32, bfloat16 or float16; weight and bias each on its own, states in x's. Index arrays are int32 or int64.

    Args:
        x: [B,T,D].
        weight: [D,W].
        bias: [D].
        activation: None, or "silu", of which "swish" is another name.
        initial_state: [N_seq,W-1,D], the inputs before each sequence, oldest first; zeros without it.
        cu_seqlens: [N_seq+1], the bounds of packed sequences, with B == 1; may repeat (a sequence of no tokens keeps its
            state). Rows of y at or past cu_seqlens[-1] are zero. One compiled program serves every packing.
        conv_state: [S,L,D] with L >= W-1, a pool that takes the place of initial_state: sequence n reads and leaves its
            state in the first W-1 rows of slot state_indices[n]. Two sequences of one call must not share a slot.
        state_indices: [N_seq]. A slot < 0 is padding: its rows of y are zero and no state is read or written.
        has_initial_state: [N_seq] bool, required with conv_state; where False, the sequence starts from zeros, whatever the
            slot holds.
        null_slot: one more slot number that means padding (vLLM's block 0).
        implementation: "mosaic_gpu" (our kernel; on a CPU under `plgpu.force_gpu_interpret_mode`), "xla" (any device and
            shape), or None: the kernel where it takes the call, else XLA. `pallas_ssm.explain` tells which, and why.

    Differentiable in every float argument with either implementation, by `jax.grad` and `jax.vjp` (reverse mode); the
    backward pass is that of the XLA form. `jax.vmap` works with "xla", and None takes XLA under it; "mosaic_gpu" refuses it.

    Raises:
        ValueError, TypeError: before anything runs. Under `jax.jit`, and for indices that are on a GPU, a slot >= S cannot
            be seen in time: its rows of y are NaN and no state is touched; bounds in cu_seqlens are clamped, and the first
            counts as 0.
        NotImplementedError: implementation="mosaic_gpu" where the kernel does not take the shape or the device.
    """
    prepared = prepare_prefill(
        x, weight, bias=bias, activation=activation, initial_state=initial_state, cu_seqlens=cu_seqlens,
        conv_state=conv_state, state_indices=state_indices, has_initial_state=has_initial_state, null_slot=null_slot,
    )  # fmt: skip
    (y,), final_state = run(prepared, implementation)
    return y, final_state


def causal_conv1d_split(
    x: jax.Array,
    weight: jax.Array,
    sizes: Sequence[int],
    *,
    chunk_size: int | None = None,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    initial_state: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    conv_state: jax.Array | None = None,
    state_indices: jax.Array | None = None,
    has_initial_state: jax.Array | None = None,
    null_slot: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """`causal_conv1d` whose output comes in parts, an array each: x, B and C of SSD, or q, k and v.

    Returns (parts, final_state): part i is [B,rows,sizes[i]], the channels that follow those of the parts before it.

    Args:
        sizes: positive channel counts that add up to D.
        chunk_size: None (rows = T), or a power of two L from 16 to 2048: every sequence's first row is then a multiple of
            it, which is the layout that chunked kernels load whole tiles from. Dense, T is padded to a multiple of L. Packed,
            sequence n starts at row L·(cu_seqlens[n] // L + n) of L·(T // L + N_seq) rows, which needs no sum over lengths
            and always leaves room. Rows that hold no token are zero.

    The other arguments, gradients and errors are those of `causal_conv1d`.
    """
    prepared = prepare_prefill(
        x, weight, sizes, chunk_size=chunk_size, bias=bias, activation=activation, initial_state=initial_state,
        cu_seqlens=cu_seqlens, conv_state=conv_state, state_indices=state_indices,
        has_initial_state=has_initial_state, null_slot=null_slot,
    )  # fmt: skip
    return run(prepared, implementation)
