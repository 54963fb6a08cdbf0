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


_PREPARE = Launcher(gdn_prepare_kernel, maxnreg=_REGISTERS)


def serves(dims: Dims, dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cuda" or triton.knobs.runtime.interpret or not _fused_gluon._is_hopper(device.index):
        return False
    return dims.L == CHUNK and dtype in _TYPES and dims.K in _WIDTHS and dims.V in _WIDTHS


def launch(
    key: Hashable,
    dims: Dims,
    config: Mapping[str, Value],
    strides: Mapping[str, tuple[int, int]],
    use_qk_l2norm: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    q_t: torch.Tensor,
    k_t: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    P: torch.Tensor,
    gates: torch.Tensor,
) -> None:
    """Writes q_t, k_t [slots·H_k·64, K], w [slots·H_v·64, K], u [slots·H_v·64, V], P [slots·H_v·64, 64] and gates
    [slots·H_v, 128] in fp32, of which a row is exp(G) and then exp(G_last - G). Slots without a chunk are left alone.

    q, k, v, g and beta: as `strides` says, in tokens any distance apart. All else is dense, and q_t to P begin at multiples of
    16 bytes.
    """
    # One program takes neighbouring heads of one key head.
    heads = math.gcd(int(config["HEADS"]), dims.H_v // dims.H_k)
    programs = dims.B * dims.NC * (dims.H_v // heads)
    if not programs:
        return
    tensors, batch, token = zip(
        *(_readable(x, *strides[name]) for name, x in (("q", q), ("k", k), ("v", v))),
        *((x, *strides[name]) for name, x in (("g", g), ("beta", beta))),
        strict=True,
    )
    _PREPARE(
        key,
        (programs, 1, 1),
        (*tensors, cu_seqlens, q_t, k_t, w, u, P, gates, dims.T, dims.NC, dims.N_seq, *batch, *token),
        (dims.H_k, dims.H_v, dims.K, dims.V, use_qk_l2norm, heads),
        4,
    )


def _readable(x: torch.Tensor, batch: int, token: int) -> tuple[torch.Tensor, int, int]:
    """(x or a dense copy of it, its strides): what lies at multiples of 16 numbers can be copied 16 bytes at a time."""
    if x.data_ptr() % 16 or batch % 16 or token % 16:
        x = x.clone(memory_format=torch.contiguous_format)
        batch, token = x.stride(0), x.stride(1)
    return x, batch, token
