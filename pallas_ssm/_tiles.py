"""How a warpgroup holds a [rows, columns] tile in registers: 16-byte vectors along the columns, rows spread over warps.

A row stays within one warp, so that a sum along it is a few shuffles and never goes through shared memory.
"""

from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

_LANES, _WARPS = 32, 4
# A tile smaller than a warpgroup is held more than once; beyond this a kernel would be doing little else.
_MAX_COPIES = 8
_COLUMNS_PER_THREAD = 16


@dataclass(frozen=True)
class TileLayout:
    """`lanes` lanes with `vector` elements each along a row, `lane_rows` rows in a warp, `warps` warps below each other."""

    vector: int
    lanes: int
    lane_rows: int
    warps: int

    @property
    def rows(self) -> int:
        """Rows that the warpgroup covers at a time; the tile has a multiple of them."""
        return self.lane_rows * self.warps

    @property
    def columns(self) -> int:
        return self.lanes * self.vector

    @property
    def copies(self) -> int:
        return (_LANES // (self.lanes * self.lane_rows)) * (_WARPS // self.warps)

    @cached_property
    def tile(self) -> Any:
        """The layout of a tile; `.reduce(1)` is that of its rows, `.reduce(0)` that of its columns."""
        tiling = plgpu.Tiling(((self.rows, self.columns), (self.lane_rows, self.columns), (1, self.vector)))
        spare_lanes, spare_warps = _LANES // (self.lanes * self.lane_rows), _WARPS // self.warps
        # Tiled, a tile is [1, 1, warps, 1, lane_rows, lanes, 1, vector].
        layout = fragmented_array.TiledLayout(
            tiling,
            warp_dims=(-6, *([plgpu.Replicated(spare_warps)] if spare_warps > 1 else [])),
            lane_dims=(-4, -3, *([plgpu.Replicated(spare_lanes)] if spare_lanes > 1 else [])),
            vector_dim=-1,
            _check_canonical=False,
        ).canonicalize()
        return plgpu.Layout.TILED(
            layout.tiling, warp_dims=layout.warp_dims, lane_dims=layout.lane_dims, vector_dim=layout.vector_dim
        )


def choose_layout(rows: int, columns: int, itemsize: int, block: int | None = None) -> TileLayout | None:
    """The layout for a [rows, columns] tile in memory, or None where there is none.

    `block`: the tile will be put together from blocks of that many columns, each of which has to be whole vectors.
    """
    unit = gcd(columns, block) if block else columns
    best: tuple[tuple[int, ...], TileLayout] | None = None
    for vector in (8, 4, 2, 1):
        if vector * itemsize > 16:
            continue
        for lanes in (1, 2, 4, 8, 16, 32):
            if unit % (vector * lanes):
                continue
            for lane_rows in (1, 2, 4, 8, 16, 32):
                if lanes * lane_rows > _LANES:
                    continue
                for warps in (1, 2, 4):
                    layout = TileLayout(vector, lanes, lane_rows, warps)
                    if rows % layout.rows or layout.copies > _MAX_COPIES:
                        continue
                    # No element twice; then whole 16-byte vectors; then few enough columns for a thread that a row
                    # vector over them (B, C) stays cheap in registers; then 128 contiguous bytes of a row, which is what
                    # a phase of a shared-memory access wants, and no more, for every doubling of the lanes is one more
                    # shuffle in each row's sum.
                    held = max(_COLUMNS_PER_THREAD, columns // lanes)
                    span = lanes * vector * itemsize
                    score = (-layout.copies, vector, -held, -abs(span.bit_length() - 8), -lanes)
                    if best is None or score > best[0]:
                        best = score, layout
    return None if best is None else best[1]
