"""From a tuning table's knobs to a launch of the Mosaic GPU kernel, or to the reason why there is none."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import jax.numpy as jnp

from ssm_configs import Device
from ssm_configs.contracts.selective_state_update import Dims

from ._device import Target
from ._stochastic_rounding import block_width
from ._tiles import TileLayout, choose_layout

OP = "selective_state_update"
# Compute capabilities that the kernel has been compiled for; it uses TMA and no tensor core.
CAPABILITIES = ((9, 0), (10, 0), (12, 0))

_MAX_GRID = 2**31 - 1
_MAX_TMA_BOX = 256
_MAX_TMA_INDEX = 2**31 - 1
# Shared memory of one block. It leaves room for a second block on sm_90 and sm_100, and fits sm_120, which has 99 KB.
_MAX_SHARED = 96 * 1024
# fp32 elements of a state that a thread works on at once. 16 keep the kernel at 40 to 90 registers, so that an SM holds
# the 5 to 12 blocks whose loads it takes to cover the memory's latency.
_CHUNK_ELEMENTS = 16
# Where nothing stages the state in shared memory (direct loads; packed sequences, between tokens) it stays in registers.
_MAX_REGISTER_ELEMENTS = 64
_MAX_LOOP_ELEMENTS = 32


class Unsupported(NotImplementedError):
    """The kernel does not take this call; the message says why."""


@dataclass(frozen=True)
class Launch:
    """A launch as it will be; the table's knobs may have given way to what fits (`plan_launch`)."""

    BLOCK_SIZE_M: int
    tiles_per_block: int
    use_tma: bool
    layout: TileLayout
    chunk: int
    """Rows of a tile that are in registers at once."""


def config_request(dims: Dims, state_dtype: Any, device: Device | None) -> dict[str, Any]:
    """What `ssm_configs.lookup` and `explain` are asked."""
    return {
        "twin": "pallas",
        "device": device,
        "dtype": jnp.dtype(state_dtype).name,
        "size": dims.N_seq * dims.H,
        "headdim": dims.P,
        "dstate": dims.N,
    }


def check_device(target: Target, op: str = OP) -> Device:
    """The device of `target`, if the kernel of `op` runs there."""
    if target.device is None:
        where = (
            "on a CPU outside plgpu.force_gpu_interpret_mode(...)"
            if target.platform == "cpu"
            else f"on {target.platform}"
        )
        raise Unsupported(f"{op}: the mosaic_gpu kernel does not run {where}; use implementation='xla' or None")
    if target.varying:
        # Pallas has no references to what varies (jax 0.11).
        raise Unsupported(
            f"{op}: the mosaic_gpu kernel does not run in a jax.shard_map with check_vma=True; give check_vma=False, or "
            "use implementation='xla' or None"
        )
    if target.platform == "gpu" and target.device.capability not in CAPABILITIES:
        raise Unsupported(
            f"{op}: the mosaic_gpu kernel needs compute capability {', '.join(f'{a}.{b}' for a, b in CAPABILITIES)}, "
            f"got {target.device.capability} ({target.device.name})"
        )
    return target.device


def plan_launch(dims: Dims, state_dtype: Any, knobs: Mapping[str, Any], *, packed: bool, stochastic: bool) -> Launch:
    """The launch nearest to `knobs` that this shape has; `Unsupported` without any.

    BLOCK_SIZE_M grows to the next divisor of P whose tile gives every thread whole vectors (at least 8 bytes of them
    with stochastic rounding), and shrinks where a tile has to stay in registers: without TMA, and between the tokens of
    packed sequences, whose blocks have one tile each. use_tma needs rows of whole 16 bytes and at most 256 elements.
    tiles_per_block shrinks to what fits shared memory (or registers), and to a part of a head's tiles or all tiles of
    some heads of a group, so that a block loads B and C once.
    """
    itemsize = jnp.dtype(state_dtype).itemsize
    P, N = dims.P, dims.N
    if dims.S * dims.H > _MAX_TMA_INDEX:
        raise Unsupported(f"{OP}: the mosaic_gpu kernel takes up to 2^31 slots × heads, got S={dims.S} × H={dims.H}")
    use_tma = bool(knobs["use_tma"]) and N * itemsize % 16 == 0 and N <= _MAX_TMA_BOX
    limit = _MAX_LOOP_ELEMENTS if packed else _MAX_REGISTER_ELEMENTS
    held = packed or not use_tma

    candidates = []
    for rows in (rows for rows in range(1, P + 1) if P % rows == 0):
        if use_tma and (rows > _MAX_TMA_BOX or rows * N * itemsize > _MAX_SHARED):
            continue
        layout = choose_layout(rows, N, itemsize, block_width(N) if stochastic else None)
        if layout is None or (held and rows * N // 128 > max(limit, layout.rows * N // 128)):
            continue
        narrow = stochastic and layout.vector * itemsize < 8
        short = rows < knobs["BLOCK_SIZE_M"]
        # in order of preference: nothing held twice, vectors not narrow, not below the knob, nearest to it
        candidates.append(((layout.copies, narrow, short, rows if not short else -rows), rows, layout))
    if not candidates:
        raise Unsupported(
            f"{OP}: the mosaic_gpu kernel finds no register layout for a [P={P}, N={N}] {jnp.dtype(state_dtype).name} "
            f"state{' with stochastic rounding' if stochastic else ''}: it needs P or N divisible by small powers of two"
        )
    _, rows, layout = min(candidates, key=lambda candidate: candidate[0])

    tiles = 1 if packed else int(knobs["tiles_per_block"])
    fits = _MAX_SHARED // (rows * N * itemsize) if use_tma else _MAX_REGISTER_ELEMENTS * 128 // (rows * N)
    while tiles > max(1, fits):
        tiles //= 2
    per_head = P // rows
    tiles = gcd(tiles, per_head) if tiles <= per_head else per_head * gcd(tiles // per_head, dims.H // dims.G)
    blocks = (dims.N_seq + packed) * dims.H * per_head // tiles
    if blocks > _MAX_GRID:
        raise Unsupported(f"{OP}: the mosaic_gpu kernel takes up to 2^31 - 1 thread blocks, got {blocks}")

    chunk = layout.rows
    while not held and rows % (2 * chunk) == 0 and 2 * chunk * N // 128 <= _CHUNK_ELEMENTS:
        chunk *= 2
    return Launch(rows, tiles, use_tma, layout, rows if packed else chunk)
