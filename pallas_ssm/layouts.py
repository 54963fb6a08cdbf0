"""Converts arguments, by name, between this package's forms and those of other libraries.

`selective_state_update`: the state pool is [S,H,P,N] everywhere and moves as it is. mamba_ssm and vLLM give every per-head
number (dt, A, D, dt_bias) repeated along headdim (and dstate) as a view of stride 0, by which their kernels know it for one
number. A JAX array has no strides; here such a number has no repeated axis to begin with.

Convolution: a state pool is [S,L,D] here, a slot's first W - 1 rows being its history, oldest first. vLLM's operators take
[S,D,L] (its memory is [S,L,D] in layout SD, which the transposed view shares, and [S,D,L] in layout DS). causal-conv1d and
mamba_ssm keep [S,D,state_len] with the newest input last and state_len >= W - 1, often W. Weights are [D,W] in all of them
and [D,1,W] in a torch Conv1d.

Gated delta rule: states are [S,H_v,K,V] here and in FLA, and [S,H_v,V,K] in FLA with state_v_first, vLLM and FlashInfer. vLLM
takes slot 0 for padding, too: null_slot=0 says so here. Its decode reads q, k and v from one projection, in this order.

Chunk-aligned rows, which `causal_conv1d_split` writes and `mamba_chunk_scan_combined` takes: every sequence begins at a
multiple of the chunk size L, dense in T padded to one, packed at row L·(cu_seqlens[n] // L + n) of L·(T // L + N_seq).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import _arguments


class PerHead(NamedTuple):
    """What mamba_ssm repeats: dt [T,H,P], A [H,P,N], D [H,P], dt_bias [H,P]; here [T,H], [H], [H], [H]."""

    dt: jax.Array
    A: jax.Array
    D: jax.Array | None = None
    dt_bias: jax.Array | None = None


def selective_state_update_from_mamba_ssm(
    dt: jax.Array, A: jax.Array, D: jax.Array | None = None, dt_bias: jax.Array | None = None
) -> PerHead:
    """One number for each head out of mamba_ssm's repeated ones (in a head-less call: one, without any axis).

    The first of every repeated axis is taken and the others are not looked at. An argument that is not repeated goes to
    `selective_state_update` as it is, and needs no conversion.
    """
    return PerHead(dt[..., 0], A[..., 0, 0], *(None if array is None else array[..., 0] for array in (D, dt_bias)))


def selective_state_update_to_mamba_ssm(
    dt: jax.Array,
    A: jax.Array,
    D: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    *,
    headdim: int,
    dstate: int,
) -> PerHead:
    """The repeated form of per-head numbers."""

    def repeat(array: jax.Array | None, *sizes: int) -> Any:
        if array is None:
            return None
        return jnp.broadcast_to(jnp.expand_dims(array, range(-len(sizes), 0)), (*array.shape, *sizes))

    return PerHead(repeat(dt, headdim), repeat(A, headdim, dstate), repeat(D, headdim), repeat(dt_bias, headdim))


class VllmCall(NamedTuple):
    """vLLM's argument list as far as it differs: per-head numbers repeated, the null slot under its own name."""

    per_head: PerHead
    null_slot: int | None


def selective_state_update_from_vllm(
    dt: jax.Array,
    A: jax.Array,
    D: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    *,
    has_indices: bool,
    null_block_id: int = 0,
) -> VllmCall:
    """As from mamba_ssm, and null_block_id, which vLLM gives also where there are no slot indices to compare it with."""
    per_head = selective_state_update_from_mamba_ssm(dt, A, D, dt_bias)
    return VllmCall(per_head, null_block_id if has_indices else None)


def selective_state_update_to_vllm(
    dt: jax.Array,
    A: jax.Array,
    D: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    *,
    headdim: int,
    dstate: int,
    null_slot: int | None = None,
) -> tuple[PerHead, int]:
    """The repeated form, and the null_block_id that means the same: -1, which no slot has, for None."""
    per_head = selective_state_update_to_mamba_ssm(dt, A, D, dt_bias, headdim=headdim, dstate=dstate)
    return per_head, -1 if null_slot is None else null_slot


def conv_state_from_vllm(conv_state: jax.Array) -> jax.Array:
    """[S,D,L] to [S,L,D]."""
    return _swap(conv_state)


def conv_state_to_vllm(conv_state: jax.Array) -> jax.Array:
    """[S,L,D] to [S,D,L]."""
    return _swap(conv_state)


def conv_state_from_causal_conv1d(conv_state: jax.Array, *, width: int) -> jax.Array:
    """[S,D,state_len], newest input last, to [S,W-1,D]: the inputs that a filter of this width looks back to."""
    if conv_state.shape[2] < width - 1:
        raise ValueError(f"conv_state: expected state_len >= {width - 1} for width {width}, got {conv_state.shape[2]}")
    return _swap(conv_state[:, :, conv_state.shape[2] - (width - 1) :])


def conv_state_to_causal_conv1d(conv_state: jax.Array, *, state_len: int) -> jax.Array:
    """[S,W-1,D] to [S,D,state_len], newest input last; what lies further back than the history is zero."""
    if state_len < conv_state.shape[1]:
        raise ValueError(f"state_len: expected at least {conv_state.shape[1]}, got {state_len}")
    return jnp.pad(_swap(conv_state), ((0, 0), (0, 0), (state_len - conv_state.shape[1], 0)))


def conv_weight_from_conv1d(weight: jax.Array) -> jax.Array:
    """[D,1,W], a depthwise Conv1d's, to [D,W]."""
    if weight.ndim != 3 or weight.shape[1] != 1:
        raise ValueError(f"weight: expected shape (D, 1, W), got {tuple(weight.shape)}")
    return weight[:, 0]


class QKV(NamedTuple):
    """q, k [T,H_k,K] and v [T,H_v,V]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


def gdn_state_from_vllm(state: jax.Array) -> jax.Array:
    """[…,V,K] to […,K,V]."""
    return jnp.swapaxes(state, -1, -2)


def gdn_state_to_vllm(state: jax.Array) -> jax.Array:
    """[…,K,V] to […,V,K]."""
    return jnp.swapaxes(state, -1, -2)


def gdn_state_from_fla(state: jax.Array, *, state_v_first: bool = False) -> jax.Array:
    """[…,V,K] to […,K,V] where FLA was told state_v_first; else its states are as they are here."""
    return jnp.swapaxes(state, -1, -2) if state_v_first else state


def gdn_state_to_fla(state: jax.Array, *, state_v_first: bool = False) -> jax.Array:
    """[…,K,V] to […,V,K] where FLA is told state_v_first; else as it is."""
    return jnp.swapaxes(state, -1, -2) if state_v_first else state


def gdn_state_from_flashinfer(state: jax.Array) -> jax.Array:
    """[…,V,K] to […,K,V]."""
    return jnp.swapaxes(state, -1, -2)


def gdn_state_to_flashinfer(state: jax.Array) -> jax.Array:
    """[…,K,V] to […,V,K]."""
    return jnp.swapaxes(state, -1, -2)


def gdn_qkv_from_vllm(mixed_qkv: jax.Array, *, key_heads: int, key_dim: int, value_dim: int) -> QKV:
    """[…,2·H_k·K + H_v·V], the convolution's output, to q, k and v."""
    keys = key_heads * key_dim
    values = mixed_qkv.shape[-1] - 2 * keys
    if min(key_heads, key_dim, value_dim) < 1 or values < value_dim or values % value_dim:
        raise ValueError(
            f"mixed_qkv: expected 2·{key_heads}·{key_dim} elements a token and a multiple of value_dim={value_dim} more, "
            f"got shape {tuple(mixed_qkv.shape)}"
        )
    lead = mixed_qkv.shape[:-1]
    return QKV(
        mixed_qkv[..., :keys].reshape(*lead, key_heads, key_dim),
        mixed_qkv[..., keys : 2 * keys].reshape(*lead, key_heads, key_dim),
        mixed_qkv[..., 2 * keys :].reshape(*lead, values // value_dim, value_dim),
    )


def gdn_qkv_to_vllm(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q, k [T,H_k,K] and v [T,H_v,V] side by side, [T,2·H_k·K + H_v·V]."""
    return jnp.concatenate([part.reshape(*part.shape[:-2], -1) for part in (q, k, v)], axis=-1)


def to_chunk_aligned(tensor: jax.Array, *, chunk_size: int, cu_seqlens: jax.Array | None = None) -> jax.Array:
    """[B,T,…] to [B,rows,…], chunk-aligned; rows that hold no token are zero."""
    _check_chunk_size(chunk_size)
    T = tensor.shape[1]
    row = jnp.arange(chunk_size * _chunks(T, chunk_size, cu_seqlens), dtype=jnp.int32)
    bounds = _arguments.index_array(cu_seqlens)
    if bounds is None:
        return _take(tensor, row, row < T)
    first = bounds // chunk_size + jnp.arange(len(bounds), dtype=jnp.int32)
    # The last sequence whose first slot is not after the row's own.
    n = jnp.clip(jnp.searchsorted(first, row // chunk_size, side="right") - 1, 0, max(len(bounds) - 2, 0))
    token = bounds[n] + row - first[n] * chunk_size
    return _take(tensor, token, token < bounds[jnp.minimum(n + 1, len(bounds) - 1)])


def from_chunk_aligned(
    tensor: jax.Array, *, chunk_size: int, tokens: int, cu_seqlens: jax.Array | None = None
) -> jax.Array:
    """[B,rows,…], chunk-aligned, to [B,T,…] with T = tokens; tokens at or past cu_seqlens[-1] are zero."""
    _check_chunk_size(chunk_size)
    rows = chunk_size * _chunks(tokens, chunk_size, cu_seqlens)
    if tensor.shape[1] != rows:
        raise ValueError(f"tensor: expected {rows} rows for {tokens} tokens, got shape {tuple(tensor.shape)}")
    bounds = _arguments.index_array(cu_seqlens)
    if bounds is None:
        return tensor[:, :tokens]
    token = jnp.arange(tokens, dtype=jnp.int32)
    n = jnp.clip(jnp.searchsorted(bounds, token, side="right") - 1, 0, len(bounds) - 1)
    begin = bounds[n]
    return _take(tensor, (begin // chunk_size + n) * chunk_size + token - begin, token < bounds[-1])


def _check_chunk_size(chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")


def _chunks(T: int, L: int, cu_seqlens: jax.Array | None) -> int:
    return -(-T // L) if cu_seqlens is None else T // L + len(cu_seqlens) - 1


def _take(tensor: jax.Array, index: jax.Array, live: jax.Array) -> jax.Array:
    """The rows of every batch row, zeros where they are not `live`."""
    if not tensor.shape[1]:
        return jnp.zeros((tensor.shape[0], len(index), *tensor.shape[2:]), tensor.dtype)
    found = jnp.take(tensor, index, axis=1, mode="clip")
    return jnp.where(live.reshape(1, -1, *(1,) * (tensor.ndim - 2)), found, 0)


def _swap(array: jax.Array) -> jax.Array:
    return jnp.swapaxes(array, 1, 2)
