"""The short depthwise causal convolution before every Mamba-2 and gated-delta-net layer: prompts and training forward.

    y[t] = act(bias + Σ_j weight[:, j] · x[t - (W - 1) + j])        j = 0 … W - 1

Before a sequence's first token stand the rows of its state (zeros without one). Tap products and their sum are fp32, oldest
tap first; y is rounded once, to x's dtype. The state that comes out is the last W - 1 inputs, copied bit for bit.

Source: Dao's causal-conv1d; slots and packed sequences follow vLLM's operator, except that padding rows give zeros.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ssm_configs import lookup
from ssm_configs.contracts import causal_conv1d as contract

from . import _arguments
from ._causal_conv1d_kernel import causal_conv1d_kernel
from ._causal_conv1d_window import word_aligned
from ._device import tuning_device_of
from ._plans import Cache, Launcher, call_key
from ._replay import replayed


@replayed
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    conv_state: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    null_slot: int | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, final_state): y [B,T,D] in x's dtype; final_state [N_seq,W-1,D], or with a pool the pool, updated in place.

    Sizes: B batch rows, T tokens, D channels, W taps (2 to 6), N_seq sequences (B of them unless packed), S slots.
    Float tensors are float32, bfloat16 or float16; states have x's dtype. Index tensors are int32 or int64.

    Args:
        x: [B,T,D], channels dense, rows any distance apart.
        weight: [D,W]; the last tap meets the current token.
        bias: [D].
        activation: None, "silu" or its other name "swish".
        initial_state: [N_seq,W-1,D].
        cu_seqlens: [N_seq+1], the bounds of packed sequences; then B = 1. They may repeat (a sequence without tokens
            hands its state on), and rows of y at or past cu_seqlens[-1] are zero.
        conv_state: [S,L,D] with L >= W - 1, a pool of states in the place of initial_state; a state is its slot's first
            W - 1 rows. A sequence without tokens leaves its slot alone.
        state_indices: [N_seq], the slot of each sequence. A slot < 0 is padding: zero rows, no state read or written. Two
            sequences with one slot are the caller's error: whose state remains is not defined.
        has_initial_state: [N_seq] bool, required with conv_state; where it is false the slot's old rows count as zeros.
        null_slot: one more slot number that means padding (vLLM's block 0).
        out: where to put y: a dense tensor of its shape and dtype, which shares no memory with x.

    Raises:
        ValueError, TypeError: before anything is launched. A slot >= S can only be seen on the host for CPU tensors; on a
            GPU its rows of y are NaN and no state is touched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (x, weight, bias, initial_state, cu_seqlens, conv_state, state_indices, has_initial_state)
    (y,), final = _run(tensors, activation, null_slot, None, None, out)
    return y, final


@replayed
def causal_conv1d_split(
    x: torch.Tensor,
    weight: torch.Tensor,
    sizes: Sequence[int],
    *,
    chunk_size: int | None = None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    conv_state: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    null_slot: int | None = None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """`causal_conv1d` of a projection that holds several tensors side by side: x, B and C of an SSD layer, or q, k and v.

    Returns ((part [B,rows,size], …), final_state), every part a dense tensor of its own, written by the one kernel.

    Args:
        sizes: the channels of each part, 1 to 4 of them, adding up to D.
        chunk_size: None for rows = T; or L, a power of two from 16 to 2048, for rows in which every sequence starts at a
            multiple of L, the layout that chunked kernels load by whole tiles. Dense: T padded to a multiple of L. Packed:
            L·(T // L + N_seq) rows, sequence n from row L·(cu_seqlens[n] // L + n) on: no sum over lengths, and always
            room. Rows that hold no token are zero.

    All else as in `causal_conv1d`.
    """
    tensors = (x, weight, bias, initial_state, cu_seqlens, conv_state, state_indices, has_initial_state)
    return _run(tensors, activation, null_slot, contract.check_sizes(sizes), chunk_size, None)


_LAUNCH = Launcher(causal_conv1d_kernel)
_DIMS: Cache[contract.Dims] = Cache()


def _run(
    tensors: tuple[Any, ...],
    activation: str | None,
    null_slot: int | None,
    sizes: tuple[int, ...] | None,
    chunk_size: int | None,
    out: torch.Tensor | None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    # with their types: 64.0 is as good a key as 64
    types = (type(null_slot), type(chunk_size), *map(type, sizes or ()))
    key = call_key(tensors, activation, null_slot, sizes, chunk_size, types)
    dims = _DIMS.get(key)
    if dims is None:
        dims = _DIMS[key] = _check(tensors, activation, null_slot, sizes, chunk_size)
    x, weight, bias, initial_state, cu_seqlens, conv_state, slots, has_history = tensors
    _arguments.check_slots_on_host("state_indices", slots, dims.S)
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    parts = _outputs(x, dims, sizes, out)
    pool = conv_state is not None
    history = conv_state if pool else _arguments.dense(initial_state)
    final = conv_state if pool else torch.empty(dims.N_seq, dims.W - 1, dims.D, dtype=x.dtype, device=x.device)
    config = lookup("causal_conv1d", **_request(x, dims))
    x = x if x.stride(2) == 1 or dims.D == 1 else x.contiguous()

    # No program but a sequence's first may reach back to the state, which that one replaces.
    BLOCK_SIZE_T = max(config["BLOCK_SIZE_T"], 8)
    if chunk_size is not None:
        BLOCK_SIZE_T = min(BLOCK_SIZE_T, chunk_size)
    widths = (*(part.shape[2] for part in parts), 0, 0, 0)[:4]
    BLOCK_SIZE_D = config["BLOCK_SIZE_D"]
    if dims.packed and chunk_size is None:
        blocks = dims.T // BLOCK_SIZE_T + dims.N_seq + 1
    else:
        # A row without tokens still hands its state on. Packed, each sequence has a chunk, and no sequence perhaps no row.
        blocks = -(-dims.rows // BLOCK_SIZE_T) if dims.packed else dims.B * max(-(-dims.rows // BLOCK_SIZE_T), 1)
    grid = (blocks * sum(-(-width // BLOCK_SIZE_D) for width in widths), 1, 1)
    if not grid[0]:
        return parts, final
    _LAUNCH(
        key,
        grid,
        (
            x, word_aligned(weight), _arguments.dense(bias), *(*parts, None, None, None)[:4],
            _arguments.dense(cu_seqlens), history, final, *map(_arguments.dense, (slots, has_history)),
            dims.T, dims.N_seq, dims.S, -1 if null_slot is None else null_slot, dims.rows,
            x.stride(0), _arguments.state_strides(x)[1], *_arguments.state_strides(history), *_arguments.state_strides(final),
        ),
        (*widths, dims.W, activation is not None, chunk_size or 0, BLOCK_SIZE_T, BLOCK_SIZE_D),
        config["num_warps"],
    )  # fmt: skip
    return parts, final


def _check(
    tensors: tuple[Any, ...], activation: object, null_slot: int | None, sizes: Any, chunk_size: int | None
) -> contract.Dims:
    named = dict(zip(contract.PREFILL, tensors, strict=True))
    _arguments.check_tensors(named, "causal_conv1d", 2)
    contract.silu_asked(activation)
    dims = _arguments.checked(contract.check_prefill, named, null_slot=null_slot, sizes=sizes, chunk_size=chunk_size)
    if named["conv_state"] is not None:
        _arguments.check_dense_channels("conv_state", named["conv_state"])
    return dims


def config_request(
    x, weight, sizes=None, *, chunk_size=None, activation=None, null_slot=None, **optional
) -> dict[str, Any]:  # fmt: skip
    """What a call with these arguments asks the tuning table for."""
    named = dict.fromkeys(contract.PREFILL[2:]) | optional
    tensors = (x, weight, *(named.pop(name) for name in contract.PREFILL[2:]))
    if named:
        raise TypeError(f"explain: causal_conv1d has no argument {', '.join(map(repr, named))}")
    return _request(x, _check(tensors, activation, null_slot, None if sizes is None else tuple(sizes), chunk_size))


def _request(x: torch.Tensor, dims: contract.Dims) -> dict[str, Any]:
    return {
        "twin": "triton",
        "device": tuning_device_of("x", x.device),
        "dtype": _arguments.dtype_name(x.dtype),
        "size": dims.B * dims.T * dims.D,
        "width": dims.W,
    }


def _outputs(x: torch.Tensor, dims: contract.Dims, sizes: tuple[int, ...] | None, out: Any) -> tuple[torch.Tensor, ...]:
    if sizes is None:
        y = _arguments.output_like(x, out)
        if not y.is_contiguous():
            raise ValueError(f"out: expected a dense tensor, got strides {y.stride()}")
        if out is not None and y.data_ptr() == x.data_ptr() and y.numel():
            # Programs read the rows before their own, which others would have overwritten.
            raise ValueError("out: expected memory of its own, got x's")
        return (y,)
    return tuple(torch.empty(dims.B, dims.rows, size, dtype=x.dtype, device=x.device) for size in sizes)
