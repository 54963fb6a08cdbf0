"""The fused path of `mamba_chunk_scan_combined`: two to four kernels, and no product or state of a chunk ever in memory.

    1. dt      steps and decays of every chunk of 64 tokens, and zeros for rows of y that belong to no sequence
    2. state   what each piece of a sequence, CHUNKS_PER_PIECE chunks, would leave if it started from zero
    3. scan    those states strung together, where a sequence may have many pieces
    4. out     y, chunk after chunk of a piece, from the state before it

A sequence's last piece needs no 2., and where every sequence is one piece 2. and 3. are not launched. The chunk of 64 tokens
is this path's own: the caller's chunk_size says where intermediate states are wanted and how chunk-aligned inputs lie.

Rounding points: steps, decays and the carried state are fp32. Rounded to the inputs' dtype, as operands of tensor cores: the
masked C·B^T·decay·dt, the state before a chunk for C·S, and x·dt·decay for the chunk's state. D·x and the gate are fp32; y is
rounded once, at the end.

No decay is clamped: a - b of `_fused_dt_kernel` carries log2(dt), and A is negative.
"""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from ssm_configs.contracts.ssd import Dims
from ssm_configs.spec import Value

from .. import _arguments
from .._plans import Launcher
from . import _fused_gluon
from ._fused_dt_kernel import fused_dt_kernel
from ._fused_out_kernel import fused_out_kernel
from ._fused_pieces import CHUNK as _CHUNK
from ._fused_state_kernel import fused_scan_kernel, fused_state_kernel
from ._plan import Plan

CHUNK: int = _CHUNK.value
_MAX_DSTATE = 128
# The output kernel itself strings up to so many states together; the sum is the same either way.
_PIECES_WITHOUT_SCAN = 8
_SCAN_BLOCK = 1024

_DT = Launcher(fused_dt_kernel)
_STATE = Launcher(fused_state_kernel)
_SCAN = Launcher(fused_scan_kernel)
_OUT = Launcher(fused_out_kernel)


def unsupported(dims: Dims, dtype_name: str, D_rank: int, *, intermediate: bool = False) -> str | None:
    """Why this path cannot serve a call, or None. `intermediate`: states after the caller's chunks are asked for."""
    del D_rank  # [H] and [H,P] alike
    if dtype_name == "float32":
        return "the state as an operand and as a sum stays in registers, which fp32 operands fill; got dtype=float32"
    if dims.N > _MAX_DSTATE:
        return f"the state of a head stays in registers, for dstate <= {_MAX_DSTATE}; got dstate={dims.N}"
    if intermediate and dims.L < CHUNK:
        return f"states are known every {CHUNK} tokens; got chunk_size={dims.L}"
    return None


def run(
    key: Hashable,
    dims: Dims,
    config: Mapping[str, Value],
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_states: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    y: torch.Tensor,
    final: torch.Tensor | None,
    final_indices: torch.Tensor | None,
    intermediate: torch.Tensor | None,
    chunk_aligned: bool,
    precision: str = "ieee",
) -> None:
    """Writes y and, unless None, `final` and `intermediate`. `key` tells apart whatever a compile may depend on."""
    products = key.products(precision) if isinstance(key, Plan) else precision
    H, G, P, N, n_tokens, n_sequences = dims.H, dims.G, dims.P, dims.N, dims.T, dims.N_seq
    aligned = dims.L if chunk_aligned else 0
    chunks_per_piece = int(config["CHUNKS_PER_PIECE"])
    splits = math.gcd(chunks_per_piece, int(config["STATES_PER_PIECE"]))
    chunks_per_state = chunks_per_piece // splits
    pieces = -(-n_tokens // (chunks_per_piece * CHUNK))
    chunks_per_row, chunk_slots = _slots(dims, CHUNK)
    pieces_per_row, piece_slots = _slots(dims, chunks_per_piece * CHUNK)
    states_per_row = n_tokens // (chunks_per_state * CHUNK) if pieces > 1 else 0
    state_slots = states_per_row if dims.packed else dims.B * states_per_row
    scanned = (pieces - 1) * splits > _PIECES_WITHOUT_SCAN

    hopper = _fused_gluon.serves(dims, x.dtype, x.device) and y.data_ptr() % 16 == 0
    dt = _with_merged_rows(dt, False)
    x, B, C, z = (_with_merged_rows(tensor, hopper) for tensor in (x, B, C, z))
    A = A.contiguous()
    D, dt_bias, initial_states, cu_seqlens, final_indices = map(
        _arguments.dense, (D, dt_bias, initial_states, cu_seqlens, final_indices)
    )
    fp32 = {"dtype": torch.float32, "device": x.device}
    ab = torch.empty(chunk_slots * H, 2 * CHUNK, **fp32)
    states = torch.empty(state_slots, H, P, N, **fp32) if state_slots else None
    totals = torch.empty(state_slots, H, **fp32) if state_slots else None
    key = (key, *(tensor if tensor is None else tensor.dtype for tensor in (final, intermediate)))

    block_h = min(16, 1 << (H - 1).bit_length())
    # One more slot than there are chunks of sequences: padding after the last of them may reach into it.
    grid = (chunk_slots + dims.packed) * -(-H // block_h)
    if grid and n_tokens:
        _DT(
            key, (grid, 1, 1),
            (dt, A, dt_bias, ab, y, cu_seqlens, n_tokens, chunks_per_row, n_sequences, _row_stride(dt), *dt_limit),
            (H, P, dt_softplus, block_h), 4,
        )  # fmt: skip

    if not dims.N_seq:  # no row of x, perhaps, to describe
        return
    block_p = max(16, min(64, 1 << (P - 1).bit_length()))
    block_n = max(16, 1 << (N - 1).bit_length())
    blocks = H * -(-P // block_p)
    strides = {"x": _row_stride(x), "B": _row_stride(B), "C": _row_stride(C), "z": _row_stride(z)}
    if states is not None:
        integers = (n_tokens, chunks_per_row, states_per_row, dims.rows, n_sequences, chunks_per_state, splits)
        if hopper:
            _fused_gluon.launch_states(
                key, dims, state_slots, x=x, B=B, ab=ab, strides=strides, states=states, totals=totals,
                cu_seqlens=cu_seqlens, integers=integers, aligned=aligned,
            )  # fmt: skip
        else:
            _STATE(
                key, (state_slots * blocks, 1, 1),
                (x, B, ab, states, totals, cu_seqlens, *integers, strides["x"], strides["B"]),
                (H, G, P, N, aligned, products, block_p, block_n, 3), 4,
            )  # fmt: skip
        if scanned:
            _SCAN(
                key, (state_slots * H * -(-(P * N) // _SCAN_BLOCK), 1, 1),
                (states, totals, initial_states, cu_seqlens, n_tokens, states_per_row, n_sequences, chunks_per_state, splits),
                (H, P * N, _SCAN_BLOCK), 4,
            )  # fmt: skip

    n_final = 0 if final is None else final.shape[0]
    integers = (
        n_tokens, chunks_per_row, pieces_per_row, states_per_row, dims.rows, n_sequences, chunks_per_piece, splits, n_final,
        H * P * N if final is None or n_final < 2 else final.stride(0), dims.NC,
    )  # fmt: skip
    export_size = dims.L if intermediate is not None else 0
    scanned = scanned and states is not None
    if n_tokens and hopper:
        _fused_gluon.launch_out(
            key, dims, int(config["HEADS_PER_BLOCK"]), int(config["num_stages"]), piece_slots, x=x, B=B, C=C, ab=ab, D=D,
            z=z, y=y, strides=strides, initial_states=initial_states, states=states, totals=totals, final=final,
            final_indices=final_indices, export=intermediate, cu_seqlens=cu_seqlens, integers=integers, aligned=aligned,
            scanned=scanned, export_size=export_size,
        )  # fmt: skip
        return
    _OUT(
        key, (piece_slots * blocks, 1, 1),
        (x, B, C, ab, D, z, y, initial_states, states, totals, final, final_indices, intermediate, cu_seqlens, *integers,
         *strides.values()),
        (H, G, P, N, D is not None and D.dim() == 2, aligned, scanned, export_size, products, block_p, block_n, 2), 4,
    )  # fmt: skip


def _slots(dims: Dims, size: int) -> tuple[int, int]:
    """(slots of `size` tokens of a batch row, slots in all). A row without tokens has one, for its state."""
    if dims.packed:
        slots = dims.T // size + dims.N_seq
        return slots, slots
    per_row = max(1, -(-dims.T // size))
    return per_row, dims.B * per_row


def _with_merged_rows(tensor: Any, hopper: bool) -> Any:
    """`tensor` [B,T,…], or a copy of it where its batch rows do not follow one another or a token is not dense.

    `hopper`: or where TMA, which wants multiples of 16 bytes, cannot read it.
    """
    if tensor is None or tensor.numel() == 0:
        return tensor
    B, T = tensor.shape[:2]
    if not tensor.is_contiguous():
        follow = B == 1 or T == 1 or tensor.stride(0) == T * tensor.stride(1)
        if not (follow and tensor[0, 0].is_contiguous()):
            return tensor.contiguous()
    if hopper and (tensor.data_ptr() % 16 or _row_stride(tensor) * tensor.element_size() % 16):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _row_stride(tensor: torch.Tensor | None) -> int:
    """Elements from token to token, over all batch rows."""
    if tensor is None or tensor.numel() == 0:
        return 0
    B, T = tensor.shape[:2]
    if T > 1:
        return tensor.stride(1)
    # A single row has no stride to speak of, and an arbitrary one would key a compile of its own.
    return tensor.stride(0) if B > 1 else tensor[0, 0].numel()
