"""Which calls the kernel for what a chunk needs no state for serves, and its launch."""

import math
from collections.abc import Hashable, Mapping

import torch
import triton.knobs

from ssm_configs.contracts.gdn import Dims
from ssm_configs.spec import Value

from .._plans import Launcher
from ..ssd import _fused_gluon
from ._prepare_kernel import gdn_prepare_kernel

CHUNK = 64
_WIDTHS = (64, 128)
_TYPES = (torch.bfloat16, torch.float16)
# Three programs of 128 threads share an SM's 65536: one computes while others wait.
_REGISTERS = 168
# Bytes.
_COPIED = 16

_PREPARE = Launcher(gdn_prepare_kernel, maxnreg=_REGISTERS)


def serves(dims: Dims, dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cuda" or triton.knobs.runtime.interpret or not _fused_gluon._is_hopper(device.index):
        return False
    return dims.L == CHUNK and dtype in _TYPES and dims.K in _WIDTHS and dims.V in _WIDTHS


def readable(x: torch.Tensor, batch: int, token: int) -> tuple[torch.Tensor, int]:
    """(q, k or v [B,T,heads,width] or a dense copy of it, numbers from token to token through all batch rows).

    Both kernels, of which one copies 16 bytes at a time and one by TMA, need tokens at one distance, a multiple of 16 bytes.
    """
    B, T, heads, width = x.shape
    dense = heads * width
    if T == 1:  # one has no stride to speak of
        token = batch if B > 1 else dense
    follow = B == 1 or batch == T * token
    if follow and token >= dense and (token * x.element_size()) % _COPIED == x.data_ptr() % _COPIED == 0:
        return x, token
    return x.clone(memory_format=torch.contiguous_format), dense


def launch(
    key: Hashable,
    dims: Dims,
    config: Mapping[str, Value],
    strides: Mapping[str, tuple[int, int]],
    use_qk_l2norm: bool,
    scale: float,
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    q_stride: int,
    k_stride: int,
    PX: torch.Tensor,
    Y: torch.Tensor,
    gates: torch.Tensor,
) -> None:
    """Writes PX [slots·H_v·64, 64], Y [slots·H_v·64, K] and, in fp32, gates [2·slots·H_v, 128]: scale·fq·exp(G) and fk·exp(G)
    of every token in one row, exp(G_last) 64 times in the next. Slots without a chunk are left alone.

    q and k: `readable`. g and beta: as `strides` says, in tokens any distance apart. All else is dense, and PX and Y begin at
    multiples of 16 bytes.
    """
    # One program takes neighbouring heads of one key head.
    heads = math.gcd(int(config["HEADS"]), dims.H_v // dims.H_k)
    programs = dims.B * dims.NC * (dims.H_v // heads)
    if not programs:
        return
    copies = (stride * q.element_size() // _COPIED for stride in (q_stride, k_stride))
    batch, token = zip(strides["g"], strides["beta"], strict=True)
    _PREPARE(
        key,
        (programs, 1, 1),
        (q, k, g, beta, cu_seqlens, PX, Y, gates, dims.T, dims.NC, dims.N_seq, scale, *copies, *batch, *token),
        (dims.H_k, dims.H_v, dims.K, use_qk_l2norm, heads),
        4,
    )
