"""Converts arguments, by name, between this package's forms and those of other libraries.

`selective_state_update`: the state pool is [S,H,P,N] everywhere and moves as it is. mamba_ssm and vLLM give every per-head
number (dt, A, D, dt_bias) repeated along headdim (and dstate) as a view of stride 0, by which their kernels know it for one
number. `triton_ssm` knows it by the same sign, so the conversion is for code that wants one form.

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

import torch

from . import _chunk_rows


class PerHead(NamedTuple):
    """What mamba_ssm repeats: dt [T,H,P], A [H,P,N], D [H,P], dt_bias [H,P]; here [T,H], [H], [H], [H]."""

    dt: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor | None = None
    dt_bias: torch.Tensor | None = None


def selective_state_update_from_mamba_ssm(
    dt: torch.Tensor, A: torch.Tensor, D: torch.Tensor | None = None, dt_bias: torch.Tensor | None = None
) -> PerHead:
    """One number for each head out of mamba_ssm's repeated ones (in a head-less call: one, without any axis).

    The first of every repeated axis is taken and the others are not looked at. An argument that is not repeated goes to
    `selective_state_update` as it is, and needs no conversion.
    """
    return PerHead(dt[..., 0], A[..., 0, 0], *(None if tensor is None else tensor[..., 0] for tensor in (D, dt_bias)))


def selective_state_update_to_mamba_ssm(
    dt: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    headdim: int,
    dstate: int,
) -> PerHead:
    """The repeated form of per-head numbers, as views of stride 0."""

    def repeat(tensor: torch.Tensor | None, *sizes: int) -> Any:
        if tensor is None:
            return None
        return tensor[(..., *(None,) * len(sizes))].expand(*tensor.shape, *sizes)

    return PerHead(repeat(dt, headdim), repeat(A, headdim, dstate), repeat(D, headdim), repeat(dt_bias, headdim))


class VllmCall(NamedTuple):
    """vLLM's argument list as far as it differs: per-head numbers repeated, the null slot under its own name."""

    per_head: PerHead
    null_slot: int | None


def selective_state_update_from_vllm(
    dt: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    has_indices: bool,
    null_block_id: int = 0,
) -> VllmCall:
    """As from mamba_ssm, and null_block_id, which vLLM gives also where there are no slot indices to compare it with."""
    per_head = selective_state_update_from_mamba_ssm(dt, A, D, dt_bias)
    return VllmCall(per_head, null_block_id if has_indices else None)


def selective_state_update_to_vllm(
    dt: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    headdim: int,
    dstate: int,
    null_slot: int | None = None,
) -> tuple[PerHead, int]:
    """The repeated form, and the null_block_id that means the same: -1, which no slot has, for None."""
    per_head = selective_state_update_to_mamba_ssm(dt, A, D, dt_bias, headdim=headdim, dstate=dstate)
    return per_head, -1 if null_slot is None else null_slot


def conv_state_from_vllm(conv_state: torch.Tensor) -> torch.Tensor:
    """[S,D,L] to [S,L,D]. A view: in layout SD the operators here update it in place."""
    return conv_state.transpose(1, 2)


def conv_state_to_vllm(conv_state: torch.Tensor) -> torch.Tensor:
    """[S,L,D] to [S,D,L], a view."""
    return conv_state.transpose(1, 2)


def conv_state_from_causal_conv1d(conv_state: torch.Tensor, *, width: int) -> torch.Tensor:
    """[S,D,state_len], newest input last, to [S,W-1,D]: the inputs that a filter of this width looks back to."""
    if conv_state.shape[2] < width - 1:
        raise ValueError(f"conv_state: expected state_len >= {width - 1} for width {width}, got {conv_state.shape[2]}")
    return conv_state[:, :, conv_state.shape[2] - (width - 1) :].transpose(1, 2)


def conv_state_to_causal_conv1d(conv_state: torch.Tensor, *, state_len: int) -> torch.Tensor:
    """[S,W-1,D] to [S,D,state_len], newest input last; what lies further back than the history is zero."""
    if state_len < conv_state.shape[1]:
        raise ValueError(f"state_len: expected at least {conv_state.shape[1]}, got {state_len}")
    return torch.nn.functional.pad(conv_state.transpose(1, 2), (state_len - conv_state.shape[1], 0))


def conv_weight_from_conv1d(weight: torch.Tensor) -> torch.Tensor:
    """[D,1,W], a depthwise Conv1d's, to [D,W]."""
    if weight.ndim != 3 or weight.shape[1] != 1:
        raise ValueError(f"weight: expected shape (D, 1, W), got {tuple(weight.shape)}")
    return weight[:, 0]


class QKV(NamedTuple):
    """q, k [T,H_k,K] and v [T,H_v,V]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def gdn_state_from_vllm(state: torch.Tensor) -> torch.Tensor:
    """[…,V,K] to […,K,V]: a view, which `fused_recurrent_gated_delta_rule` updates in place."""
    return state.transpose(-1, -2)


def gdn_state_to_vllm(state: torch.Tensor) -> torch.Tensor:
    """[…,K,V] to […,V,K], a view."""
    return state.transpose(-1, -2)


def gdn_state_from_fla(state: torch.Tensor, *, state_v_first: bool = False) -> torch.Tensor:
    """[…,V,K] to […,K,V] where FLA was told state_v_first; else its states are as they are here."""
    return state.transpose(-1, -2) if state_v_first else state


def gdn_state_to_fla(state: torch.Tensor, *, state_v_first: bool = False) -> torch.Tensor:
    """[…,K,V] to […,V,K] where FLA is told state_v_first; else as it is."""
    return state.transpose(-1, -2) if state_v_first else state


def gdn_state_from_flashinfer(state: torch.Tensor) -> torch.Tensor:
    """[…,V,K] to […,K,V], a view."""
    return state.transpose(-1, -2)


def gdn_state_to_flashinfer(state: torch.Tensor) -> torch.Tensor:
    """[…,K,V] to […,V,K], a view."""
    return state.transpose(-1, -2)


def gdn_qkv_from_vllm(mixed_qkv: torch.Tensor, *, key_heads: int, key_dim: int, value_dim: int) -> QKV:
    """[…,2·H_k·K + H_v·V], the convolution's output, to q, k and v: views, which the operators here read as they lie."""
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


def gdn_qkv_to_vllm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q, k [T,H_k,K] and v [T,H_v,V] side by side, [T,2·H_k·K + H_v·V]."""
    return torch.cat([part.reshape(*part.shape[:-2], -1) for part in (q, k, v)], dim=-1)


def to_chunk_aligned(tensor: torch.Tensor, *, chunk_size: int, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """[B,T,…] to [B,rows,…], chunk-aligned; rows that hold no token are zero."""
    T = tensor.shape[1]
    row = torch.arange(_chunk_rows.rows(T, chunk_size, cu_seqlens), device=tensor.device)
    if cu_seqlens is None:
        return _chunk_rows.take(tensor, row, row < T)
    return _chunk_rows.take(tensor, *_chunk_rows.token_of_row(row, chunk_size, cu_seqlens.long()))


def from_chunk_aligned(
    tensor: torch.Tensor, *, chunk_size: int, tokens: int, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """[B,rows,…], chunk-aligned, to [B,T,…] with T = tokens; tokens at or past cu_seqlens[-1] are zero."""
    rows = _chunk_rows.rows(tokens, chunk_size, cu_seqlens)
    if tensor.shape[1] != rows:
        raise ValueError(f"tensor: expected {rows} rows for {tokens} tokens, got shape {tuple(tensor.shape)}")
    if cu_seqlens is None:
        return tensor[:, :tokens]
    token = torch.arange(tokens, device=tensor.device)
    return _chunk_rows.take(tensor, *_chunk_rows.row_of_token(token, chunk_size, cu_seqlens.long()))
