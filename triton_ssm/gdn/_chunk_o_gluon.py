"""Which calls the Hopper form of `chunk_o`'s kernel serves, and its launch."""

from collections.abc import Hashable
from typing import Any

import torch
import triton.knobs
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ssm_configs.contracts.gdn import Dims

from .._plans import Launcher
from ..ssd import _fused_gluon
from ..ssd._fused_gluon import tiles
from ._chunk_o_gluon_kernel import CHUNK, TILE, chunk_o_kernel_hopper

Strides = dict[str, tuple[int, int]]
"""Elements from batch row to batch row and from token to token."""

_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_SIZES = (64, 128)
_L, _WIDTH = CHUNK.value, TILE.value
# Shared memory of an SM of which two programs have a half each: less what the system takes, gates and barriers.
_SHARED = 233_472 // 2 - 1024 - 2304
# The kernel is unrolled over its units.
_MAX_UNITS = 8
_LAUNCH = Launcher(chunk_o_kernel_hopper)


def serves(dims: Dims, strides: Strides, q, k, v, h, o) -> bool:
    """16-bit, chunks of 64, K and V of 64 or 128, h in q's dtype, and everything where TMA can read it."""
    if q.device.type != "cuda" or triton.knobs.runtime.interpret or q.dtype not in _TYPES or h.dtype != q.dtype:
        return False
    if dims.L != _L or dims.K not in _SIZES or dims.V not in _SIZES or not dims.NC:
        return False
    if not _fused_gluon._is_hopper(q.device.index) or any(tensor.data_ptr() % 16 for tensor in (q, k, v, h, o)):
        return False
    widths = {"q": dims.H_k * dims.K, "k": dims.H_k * dims.K, "v": dims.H_v * dims.V}
    # Batch rows of one descriptor are whole tokens apart, and coordinates are 32-bit.
    rows = [dims.B * dims.NC * dims.H_v * max(dims.K, dims.V)]
    for name, width in widths.items():
        batch, token = strides[name]
        if token < width or token % 8 or batch % token:
            return False
        rows.append(dims.B * max(batch // token, dims.T))
    return max(rows) < 2**31


def heads_and_stages(dims: Dims, HEADS: int, num_stages: int) -> tuple[int, int]:
    """Value heads of a program, and units of 64 columns under way: no more than let two programs share an SM."""
    parts = dims.V // _WIDTH
    heads = min(HEADS, _MAX_UNITS // parts)
    while dims.H_v // dims.H_k % heads:
        heads -= 1
    room = (_SHARED - 2 * _L * dims.K * 2) // ((_L + dims.K) * _WIDTH * 2)
    return heads, min(heads * parts, num_stages * parts, room)


def launch(
    key: Hashable, dims: Dims, HEADS: int, num_stages: int, strides: Strides, base_2: bool, v_first: bool, scale: float,
    q, k, v, h, g, cu_seqlens, o,
) -> None:  # fmt: skip
    H_k, H_v, K, V = dims.H_k, dims.H_v, dims.K, dims.V
    heads, stages = heads_and_stages(dims, HEADS, num_stages)
    rows = {name: batch // token for name, (batch, token) in strides.items()}

    def tokens(name: str, tensor: torch.Tensor, width: int, tile: int) -> TensorDescriptor:
        return tiles(tensor, (dims.B - 1) * rows[name] + dims.T, strides[name][1], width, tile)

    states = dims.B * dims.NC * H_v
    # Of all packed tokens the padding may need one slot more.
    slots = dims.B * dims.NC + dims.packed
    _LAUNCH(
        key, (slots * (H_v // heads), 1, 1),
        (o, tokens("q", q, H_k * K, K), tokens("k", k, H_k * K, K), tokens("v", v, H_v * V, _WIDTH),
         tiles(h, states * V, K, K, K) if v_first else _columns(h, states * K, V, K),
         tiles(o, dims.B * dims.T, H_v * V, H_v * V, _WIDTH), g, cu_seqlens,
         dims.T, dims.NC, dims.N_seq, rows["q"], rows["k"], rows["v"], scale),
        (H_k, H_v, K, V, base_2, v_first, heads, stages), 4,
    )  # fmt: skip


def _columns(h: torch.Tensor, rows: int, width: int, K: int) -> TensorDescriptor:
    """64 columns at a time of a state [K,V]."""
    layout: Any = gl.NVMMASharedLayout.get_default_for([K, _WIDTH], _TYPES[h.dtype])
    return TensorDescriptor(h, [rows, width], [width, 1], [K, _WIDTH], layout)
