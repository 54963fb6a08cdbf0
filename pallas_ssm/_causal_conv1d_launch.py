"""From a tuning table's knobs to a launch of a convolution kernel, or to the reason why there is none."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from ssm_configs import Device
from ssm_configs.contracts.causal_conv1d import Dims

from ._causal_conv1d_call import Static
from ._selective_state_update_launch import Unsupported

PREFILL, UPDATE = "causal_conv1d", "causal_conv1d_update"

_LANES, _WARPS = 32, 4
_THREADS = _LANES * _WARPS
_MAX_GRID = 2**31 - 1
_MAX_INDEX = 2**31 - 1
# Rows and columns that one TMA copy takes.
_MAX_TMA_BOX = 256
# Where in shared memory a TMA copy may begin, and so the least size of a row.
_TMA_ALIGNMENT = 128
# Shared memory of one block. It leaves room for others on every device, and fits sm_120, which has 99 KB.
_MAX_SHARED = 64 * 1024
# Elements that a thread loads before it computes on the first.
_ELEMENTS_IN_FLIGHT = 16
# Channels times sequences that a thread updates at once: its inputs are all in registers.
_MAX_UPDATE_ELEMENTS = 32
# Channels of a prompt's row that a thread has, where so many fit: 32 bits or more, so that a warp's access fills every bank.
_VECTOR = 2


@dataclass(frozen=True)
class RowLayout:
    """How a warpgroup holds [rows, columns] in registers: `rows` rows at a time, each over 128 / rows threads."""

    rows: int
    vector: int

    @cached_property
    def tile(self) -> Any:
        """The layout of a tile; `.reduce(0)` is that of a row."""
        warp_rows = min(self.rows, _WARPS)
        lane_rows = self.rows // warp_rows
        lane_columns = _LANES // lane_rows * self.vector
        columns = _WARPS // warp_rows * lane_columns
        tiling = plgpu.Tiling(((self.rows, columns), (lane_rows, lane_columns), (1, self.vector)))
        # Tiled, a tile is [1, 1, warp rows, warp columns, lane rows, lane columns, 1, vector].
        layout = fragmented_array.TiledLayout(
            tiling, warp_dims=(-6, -5), lane_dims=(-4, -3), vector_dim=-1, _check_canonical=False
        ).canonicalize()
        return plgpu.Layout.TILED(
            layout.tiling, warp_dims=layout.warp_dims, lane_dims=layout.lane_dims, vector_dim=layout.vector_dim
        )

    @property
    def row(self) -> Any:
        return self.tile.reduce(0)

    @property
    def scalars(self) -> Any:
        """A row whose threads have one element here and there: what a strided row can be loaded as."""
        return RowLayout(self.rows, 1).row


@dataclass(frozen=True)
class PrefillLaunch:
    """A launch as it will be; the table's knobs may have given way to what fits (`plan_prefill`)."""

    BLOCK_SIZE_T: int
    BLOCK_SIZE_D: int
    layout: RowLayout
    """Its rows are strips: each walks through BLOCK_SIZE_T / strips consecutive tokens, with the taps in registers."""
    unroll: int
    """Tokens of a strip that are loaded before the first is computed on."""

    @property
    def strips(self) -> int:
        return self.layout.rows

    @property
    def strip_rows(self) -> int:
        return self.BLOCK_SIZE_T // self.strips


@dataclass(frozen=True)
class UpdateLaunch:
    """A launch as it will be; the table's knobs may have given way to what fits (`plan_update`)."""

    BLOCK_SIZE_D: int
    BLOCK_SIZE_B: int
    layout: RowLayout


Launch = PrefillLaunch | UpdateLaunch


def config_request(op: str, dims: Dims, dtype: Any, device: Device | None) -> dict[str, Any]:
    """What `ssm_configs.lookup` and `explain` are asked."""
    size = dims.N_seq * dims.D if op == UPDATE else dims.B * dims.T * dims.D
    return {"twin": "pallas", "device": device, "dtype": jnp.dtype(dtype).name, "size": size, "width": dims.W}


def plan_prefill(static: Static, dtype: Any, knobs: Mapping[str, Any]) -> PrefillLaunch:
    """The launch nearest to `knobs` that this shape has; `Unsupported` without any.

    BLOCK_SIZE_D shrinks to the next power of two that divides D (and, split, every size), and grows where that is less
    than the 128 bytes of a row of shared memory; TMA takes no more than 256. BLOCK_SIZE_T shrinks to what the tokens
    (or, aligned, chunk_size) and shared memory leave, and grows where a strip would be shorter than the taps before a token.
    """
    dims = static.dims
    itemsize = jnp.dtype(dtype).itemsize
    unit = gcd(*static.sizes)
    widths = [
        width
        for width in (256, 128, 64, 32)
        if unit % width == 0 and width <= _MAX_TMA_BOX and width * itemsize % _TMA_ALIGNMENT == 0
    ]
    if not widths:
        raise Unsupported(
            f"{PREFILL}: the mosaic_gpu kernel needs channels in multiples of {_TMA_ALIGNMENT} bytes, "
            f"{_TMA_ALIGNMENT // itemsize} of {jnp.dtype(dtype).name}, got "
            + (f"D={dims.D}" if len(static.sizes) == 1 else f"sizes={static.sizes}")
        )
    columns = max((width for width in widths if width <= knobs["BLOCK_SIZE_D"]), default=widths[-1])

    most = min(_power_of_two(max(dims.T, 1)), static.chunk_size or _MAX_INDEX)
    vector = _VECTOR
    while vector >= 1:
        strips = max(1, _THREADS * vector // columns)
        least = strips * _power_of_two(dims.W - 1)
        rows = max(least, min(int(knobs["BLOCK_SIZE_T"]), most))
        while rows > least and _shared_bytes(rows, columns, strips, dims.W, itemsize) > _MAX_SHARED:
            rows //= 2
        while rows // strips + dims.W - 1 > _MAX_TMA_BOX:
            rows //= 2
        if rows <= (static.chunk_size or rows) and columns >= vector * _THREADS // strips:
            break
        vector //= 2
    else:
        raise Unsupported(
            f"{PREFILL}: the mosaic_gpu kernel finds no layout for {columns} channels at width {dims.W} in chunks of "
            f"{static.chunk_size} rows"
        )
    launch = PrefillLaunch(rows, columns, RowLayout(strips, vector), 1)
    launch = PrefillLaunch(rows, columns, launch.layout, min(launch.strip_rows, max(2, _ELEMENTS_IN_FLIGHT // vector)))
    if max(dims.B * dims.T, dims.B * dims.rows + rows, dims.S) > _MAX_INDEX - _MAX_TMA_BOX:
        raise Unsupported(f"{PREFILL}: the mosaic_gpu kernel takes up to 2^31 rows, got B={dims.B} × T={dims.T}")
    if dims.B * row_blocks(static, rows) * (dims.D // columns) > _MAX_GRID:
        raise Unsupported(f"{PREFILL}: the mosaic_gpu kernel takes up to 2^31 - 1 thread blocks")
    return launch


def row_blocks(static: Static, rows: int) -> int:
    """Blocks of `rows` output rows: all there are, or, packed and not aligned, a bound that does not need the lengths."""
    dims = static.dims
    if dims.packed and static.chunk_size is None:
        # Sequence n has the blocks from cu_seqlens[n] // rows + n on; one more "sequence" is what belongs to nobody.
        return dims.T // rows + dims.N_seq + 1
    return -(-dims.rows // rows)


def plan_update(static: Static, dtype: Any, knobs: Mapping[str, Any]) -> UpdateLaunch:
    """The launch nearest to `knobs` that this shape has; `Unsupported` without any.

    BLOCK_SIZE_D shrinks to the next power of two that divides D, and grows where that is less than 128, one channel for
    every thread. BLOCK_SIZE_B shrinks to what divides the batch and fits in registers; packed sequences have a block each.
    """
    dims = static.dims
    itemsize = jnp.dtype(dtype).itemsize
    widths = [width for width in (2048, 1024, 512, 256, 128) if dims.D % width == 0]
    if not widths:
        raise Unsupported(f"{UPDATE}: the mosaic_gpu kernel needs D in multiples of {_THREADS}, got D={dims.D}")
    columns = max((width for width in widths if width <= knobs["BLOCK_SIZE_D"]), default=widths[-1])
    batch = 1 if dims.packed else gcd(_power_of_two(int(knobs["BLOCK_SIZE_B"])), dims.N_seq)
    while batch * columns > _MAX_UPDATE_ELEMENTS * _THREADS:
        batch //= 2
    if (dims.N_seq // batch + dims.packed) * (dims.D // columns) > _MAX_GRID:
        raise Unsupported(f"{UPDATE}: the mosaic_gpu kernel takes up to 2^31 - 1 thread blocks")
    return UpdateLaunch(columns, batch, RowLayout(1, min(16 // itemsize, columns // _THREADS)))


def _power_of_two(n: int) -> int:
    """The least power of two >= n."""
    return 1 << (n - 1).bit_length()


def _shared_bytes(rows: int, columns: int, strips: int, width: int, itemsize: int) -> int:
    return (rows + strips * (width - 1)) * columns * itemsize + (width + 1) * columns * 4
