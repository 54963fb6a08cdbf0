"""The short depthwise causal convolution, one decode step (or a few tokens) at a time.

    y[t] = act(bias + Σ_j weight[:, j] · x[t - (W - 1) + j])        j = 0 … W - 1

The inputs before a sequence's tokens are the rows of its slot. Tap products and their sum are fp32, oldest tap first; y is
rounded once, to x's dtype. What enters the state is copied bit for bit.

Source: Dao's causal-conv1d; slots and speculative decode follow vLLM's operator, except that padding rows give zeros and that
what is accepted is clamped to what the state holds.
"""

from typing import Any

import torch

from ssm_configs import lookup
from ssm_configs.contracts import causal_conv1d as contract

from . import _arguments
from ._causal_conv1d_update_kernel import causal_conv1d_update_kernel
from ._causal_conv1d_window import word_aligned
from ._device import tuning_device_of
from ._plans import Cache, Launcher, call_key
from ._replay import replayed


@replayed
def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    conv_state_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    null_slot: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Updates `conv_state` in place and returns y [T,D], in x's dtype.

    Sizes: T tokens, one of each of N_seq = T sequences unless packed, D channels, W taps (2 to 6), S slots of L rows.
    Float tensors are float32, bfloat16 or float16; the state has x's dtype. Index tensors are int32 or int64.

    Args:
        x: [T,D], channels dense, rows any distance apart.
        conv_state: [S,L,D], channels dense, L >= W - 1. History is a slot's first W - 1 rows, oldest first.
        weight: [D,W]; the last tap meets the current token.
        bias: [D].
        activation: None, "silu" or its other name "swish".
        conv_state_indices: [N_seq], the slot of each sequence; slot n for sequence n without it. A slot < 0 is padding:
            zero rows, no state read or written. Two sequences with one slot are the caller's error.
        cu_seqlens: [N_seq+1], the bounds of packed sequences. They may repeat (a sequence without tokens leaves its slot
            alone), and rows of y at or past cu_seqlens[-1] are zero.
        num_accepted_tokens: [N_seq], speculative decode. The last step left W - 2 older rows and then its own tokens; with
            a of them accepted (clamped to 1 … L - W + 2), history is rows a - 1 … a + W - 3. This step leaves the history
            without its first row and then its own tokens, as far as the L rows go: for k tokens, L = W - 2 + k.
        null_slot: one more slot number that means padding (vLLM's block 0).
        out: where to put y; its rows may be any distance apart.

    Raises:
        ValueError, TypeError: before anything is launched. A slot >= S can only be seen on the host for CPU tensors; on a
            GPU its rows of y are NaN and no state is touched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (x, conv_state, weight, bias, conv_state_indices, cu_seqlens, num_accepted_tokens)
    key = call_key(tensors, activation, type(null_slot), null_slot)
    dims = _DIMS.get(key)
    if dims is None:
        dims = _DIMS[key] = _check(tensors, activation, null_slot)
    _arguments.check_slots_on_host("conv_state_indices", conv_state_indices, dims.S)
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    y = _arguments.output_like(x, out)
    config = lookup("causal_conv1d_update", **_request(x, dims))
    if dims.T == 0:
        return y

    x = _arguments.dense_rows(x)
    BLOCK_SIZE_D = config["BLOCK_SIZE_D"]
    BLOCK_SIZE_B = 1 if dims.packed else config["BLOCK_SIZE_B"]
    # Without a sequence there is nobody to zero the padding rows, hence at least one.
    grid = (max(-(-dims.N_seq // BLOCK_SIZE_B), 1) * -(-dims.D // BLOCK_SIZE_D), 1, 1)
    _LAUNCH(
        key,
        grid,
        (
            x, conv_state, word_aligned(weight), _arguments.dense(bias), y,
            *map(_arguments.dense, (conv_state_indices, cu_seqlens, num_accepted_tokens)),
            dims.T, dims.N_seq, dims.S, -1 if null_slot is None else null_slot,
            _arguments.row_stride(x), _arguments.row_stride(y), *_arguments.state_strides(conv_state),
        ),
        (dims.D, dims.L, dims.W, activation is not None, BLOCK_SIZE_D, BLOCK_SIZE_B),
        config["num_warps"],
    )  # fmt: skip
    return y


_LAUNCH = Launcher(causal_conv1d_update_kernel)
_DIMS: Cache[contract.Dims] = Cache()


def _check(tensors: tuple[Any, ...], activation: object, null_slot: int | None) -> contract.Dims:
    named = dict(zip(contract.UPDATE, tensors, strict=True))
    _arguments.check_tensors(named, "causal_conv1d_update", 3)
    contract.silu_asked(activation)
    dims = _arguments.checked(contract.check_update, named, null_slot=null_slot)
    _arguments.check_dense_channels("conv_state", named["conv_state"])
    return dims


def config_request(x, conv_state, weight, *, activation=None, null_slot=None, **optional) -> dict[str, Any]:
    """What a call with these arguments asks the tuning table for."""
    named = dict.fromkeys(contract.UPDATE[3:]) | optional
    tensors = (x, conv_state, weight, *(named.pop(name) for name in contract.UPDATE[3:]))
    if named:
        raise TypeError(f"explain: causal_conv1d_update has no argument {', '.join(map(repr, named))}")
    return _request(x, _check(tensors, activation, null_slot))


def _request(x: torch.Tensor, dims: contract.Dims) -> dict[str, Any]:
    return {
        "twin": "triton",
        "device": tuning_device_of("x", x.device),
        "dtype": _arguments.dtype_name(x.dtype),
        "size": dims.N_seq * dims.D,
        "width": dims.W,
    }
