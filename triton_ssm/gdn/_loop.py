"""Which calls the fused path serves, and the launch of its second kernel."""

import math
from collections.abc import Hashable

import torch

from ssm_configs.config import Config
from ssm_configs.contracts.gdn import Dims

from .._plans import Launcher
from ..ssd._fused_gluon import row_tiles, tiles
from . import _prepare, _segments
from ._loop_kernel import COLUMNS as _COLUMNS
from ._loop_kernel import GATE_ROWS as _GATE_ROWS
from ._loop_kernel import gdn_loop_kernel_hopper

COLUMNS: int = _COLUMNS.value
GATE_ROWS: int = _GATE_ROWS.value
CHUNK = _prepare.CHUNK
_SHARED_LIMIT = 232_448
# For barriers, and what the compiler keeps for itself.
_SPARE = 2048
# A chunk is waited for while the one before still has its place.
_MIN_STAGES = 2
# Rows of an array, and programs.
_MAX_COUNT = 2**31 - 1
# Of the largest Hopper; one program takes most of one's shared memory.
_SMS = 132
_LOOP = Launcher(gdn_loop_kernel_hopper)


def serves(dims: Dims, o: torch.Tensor) -> bool:
    """Whether both fused kernels take a call whose outputs go to `o`, of q's dtype."""
    if not _prepare.serves(dims, o.dtype, o.device) or not o.numel() or not dims.N_seq:
        return False
    # TMA writes o, and counts rows with 32 bits.
    rows = max(dims.B * dims.NC * dims.H_v * CHUNK, dims.B * dims.T + CHUNK, _programs(dims, 1))
    return rows <= _MAX_COUNT and o.data_ptr() % 16 == 0


def launch(
    key: Hashable, dims: Dims, config: Config, q, k, v, q_stride: int, k_stride: int, v_stride: int,
    PX, Y, gates, initial, final, cu_seqlens, o: torch.Tensor,
) -> None:  # fmt: skip
    """o [B,T,H_v,V] and, unless None, `final` [N_seq,H_v,K,V] in fp32 of `readable` q, k and v and what `_prepare` wrote."""
    length = _segments.chunks_of(dims, _SMS)
    segments = -(-dims.NC // length)
    warpgroups = warpgroups_of(dims) if segments == 1 else 1
    stages = max(_MIN_STAGES, min(int(config["num_stages"]), (_SHARED_LIMIT - _SPARE) // _stage_bytes(dims)))
    rows, keys, values, of_chunks = dims.B * dims.T, dims.H_k * dims.K, dims.H_v * dims.V, Y.shape[0]
    descriptors = (
        tiles(q, rows, q_stride, keys, dims.K),
        tiles(k, rows, k_stride, keys, dims.K),
        tiles(v, rows, v_stride, values, COLUMNS),
        tiles(PX, of_chunks, CHUNK, CHUNK, CHUNK),
        tiles(Y, of_chunks, dims.K, dims.K, dims.K),
        row_tiles(gates, GATE_ROWS),
        tiles(o, rows, values, values, COLUMNS),
    )
    if segments > 1:
        _, k, v, _, Y, gates, _ = descriptors
        initial = _segments.states_before(key, dims, length, k, v, Y, gates, initial)
    _LOOP(
        key, (_programs(dims, warpgroups) * segments, 1, 1),
        (o, *descriptors, initial, final, cu_seqlens, dims.T, dims.NC, dims.N_seq, segments, length),
        (dims.H_k, dims.H_v, dims.K, dims.V, warpgroups, stages), 4,
    )  # fmt: skip


def warpgroups_of(dims: Dims) -> int:
    """Of one program, 64 columns of a state each: two where one would make more programs than run at once."""
    return 2 if dims.N_seq > most_sequences(dims.H_v, dims.V) else 1


def fewest_tokens(H_v: int, K: int, V: int, most: int) -> int | None:
    """Of a dense sequence in segments; None where none of `most` tokens is."""
    return _segments.fewest_tokens(H_v, K, V, most, _SMS)


def most_sequences(H_v: int, V: int) -> float:
    """That one warpgroup a program serves."""
    return math.inf if V % (2 * COLUMNS) else _SMS // (H_v * (V // COLUMNS))


def _programs(dims: Dims, warpgroups: int) -> int:
    """One sequence more for rows of o that are no sequence's."""
    return (dims.N_seq + dims.packed) * dims.H_v * (dims.V // (warpgroups * COLUMNS))


def _stage_bytes(dims: Dims) -> int:
    """Of a chunk in shared memory: q, k and Y, two tiles of v and o, PX, and the gates."""
    return (3 * dims.K + 2 * COLUMNS + CHUNK) * CHUNK * 2 + GATE_ROWS * 2 * CHUNK * 4
