"""Which calls the Hopper forms of the fused scan's kernels serve, and their launch."""

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton.knobs
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ssm_configs.contracts.ssd import Dims

from .._plans import Launcher
from ._fused_gluon_out_kernel import fused_out_kernel_hopper
from ._fused_gluon_state_kernel import fused_state_kernel_hopper

_SHAPES = {(64, 64), (64, 128)}
_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_SHARED_LIMIT = 232_448
_CHUNK = 64
_STATE = Launcher(fused_state_kernel_hopper)
_OUT = Launcher(fused_out_kernel_hopper)


def serves(dims: Dims, dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return False
    return (dims.P, dims.N) in _SHAPES and dtype in _TYPES and _is_hopper(device.index)


@functools.cache
def _is_hopper(index: int | None) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] == 9


@functools.cache
def _layout(width: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([_CHUNK, width], _TYPES[dtype])


_ROW_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def tiles(tensor: torch.Tensor, rows: int, row_stride: int, width: int, tile: int) -> TensorDescriptor:
    """64-token tiles, `tile` columns wide, of a tensor of `rows` tokens of `width` columns."""
    return TensorDescriptor(tensor, [rows, width], [row_stride, 1], [_CHUNK, tile], _layout(tile, tensor.dtype))


def _shared_heads(dims: Dims, heads: int) -> int:
    """`heads`, if the heads of a group come in such packs."""
    return heads if dims.H // dims.G % heads == 0 else 1


def _stage(heads: int, columns: int) -> int:
    """Bytes of a chunk in shared memory: 16-bit columns of x, B and C, and four rows of decays and weights for each head."""
    return columns * _CHUNK * 2 + heads * 4 * _CHUNK * 4


def row_tiles(ab: torch.Tensor, heads: int) -> TensorDescriptor:
    """Steps and decays of one chunk, `heads` heads at a time."""
    return TensorDescriptor(ab, list(ab.shape), [2 * _CHUNK, 1], [heads, 2 * _CHUNK], _ROW_LAYOUT)


def launch_states(
    key: Hashable, dims: Dims, state_slots: int, *, x, B, ab, strides: dict[str, int], states, totals, cu_seqlens,
    integers: tuple[int, ...], aligned: int,
) -> None:  # fmt: skip
    H, G, P, N = dims.H, dims.G, dims.P, dims.N
    heads, rows = _shared_heads(dims, 2), dims.B * dims.rows
    stages = min(6, (_SHARED_LIMIT - 2048) // _stage(heads, heads * P + N))
    _STATE(
        key, (state_slots * (H // heads), 1, 1),
        (states, totals, row_tiles(ab, heads), tiles(x, rows, strides["x"], H * P, P), tiles(B, rows, strides["B"], G * N, N),
         cu_seqlens, *integers),
        (H, G, P, N, aligned, heads, stages), 4,
    )  # fmt: skip


def launch_out(
    key: Hashable, dims: Dims, heads: int, stages: int, piece_slots: int, *, x, B, C, ab, D, z, y, strides: dict[str, int],
    initial_states, states, totals, final, final_indices, export, cu_seqlens, integers: tuple[int, ...],
    aligned: int, scanned: bool, export_size: int,
) -> None:  # fmt: skip
    H, G, P, N = dims.H, dims.G, dims.P, dims.N
    heads = _shared_heads(dims, heads)
    tokens, rows = dims.B * dims.T, dims.B * dims.rows
    stages = min(
        stages, (_SHARED_LIMIT - 2048 - heads * _CHUNK * (2 * _CHUNK + P) * 2) // _stage(heads, heads * P + 2 * N)
    )
    descriptors = (
        row_tiles(ab, heads),
        tiles(x, rows, strides["x"], H * P, P),
        tiles(B, rows, strides["B"], G * N, N),
        tiles(C, rows, strides["C"], G * N, N),
        None if z is None else tiles(z, tokens, strides["z"], H * P, P),
        tiles(y, tokens, H * P, H * P, P),
    )
    _OUT(
        key, (piece_slots * (H // heads), 1, 1),
        (y, *descriptors, D, initial_states, states, totals, final, final_indices, export, cu_seqlens, *integers),
        (H, G, P, N, D is not None and D.dim() == 2, aligned, scanned, export_size, heads, stages), 4,
    )  # fmt: skip
