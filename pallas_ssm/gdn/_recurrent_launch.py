"""From a tuning table's knob to a launch of the Mosaic GPU kernel, or to the reason why there is none."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import jax.numpy as jnp

from ssm_configs import Device
from ssm_configs.contracts.gdn import RecurrentDims

from .. import _selective_state_update_launch as ssu
from .._selective_state_update_launch import Unsupported
from .._tiles import TileLayout, choose_layout
from ._recurrent_call import OP

_MAX_GRID = 2**31 - 1
_MAX_TMA_INDEX = 2**31 - 1
# Elements of a state that a thread holds between its two sums and its update. 32 in fp32 leave room for six blocks an SM.
_THREAD_ELEMENTS = 32
# Shared memory of one block. It leaves room for a second block on sm_90 and sm_100, and fits sm_120, which has 99 KB.
_MAX_SHARED = 80 * 1024
_TMA_BYTES = 16


@dataclass(frozen=True)
class Launch:
    """A launch as it will be; the table's knob may have given way to what fits (`plan_launch`)."""

    BLOCK_SIZE_V: int
    """Columns of one head's state that one thread block updates."""
    columns: int
    """Those of one tile, [K,columns], which is in registers at once."""
    use_tma: bool
    """Whether the tiles go through shared memory; else straight through registers."""
    layout: TileLayout

    @property
    def tiles_per_block(self) -> int:
        return self.BLOCK_SIZE_V // self.columns

    def tiles(self, K: int) -> ssu.Launch:
        """The same as `_selective_state_update_tiles` knows it: tiles of K rows, each all at once."""
        return ssu.Launch(K, self.tiles_per_block, self.use_tma, self.layout, K)


def config_request(dims: RecurrentDims, state_dtype: Any, device: Device | None) -> dict[str, Any]:
    """What `ssm_configs.lookup` and `explain` are asked."""
    return {
        "twin": "pallas",
        "device": device,
        "dtype": jnp.dtype(state_dtype).name,
        "size": dims.N_seq * dims.H_v,
        "K": dims.K,
        "V": dims.V,
    }


def plan_launch(dims: RecurrentDims, state_dtype: Any, knobs: Mapping[str, Any], *, packed: bool) -> Launch:
    """The launch nearest to `knobs` that this shape has; `Unsupported` without any.

    A tile has as many columns as divide V, up to BLOCK_SIZE_V and 32 elements a thread; a block has one tile, or the two or
    more that make up BLOCK_SIZE_V, by TMA, which needs rows of whole 16 bytes. Packed sequences have one tile a block, which
    stays in registers between tokens.
    """
    K, V, itemsize = dims.K, dims.V, jnp.dtype(state_dtype).itemsize
    if dims.S * dims.H_v > _MAX_TMA_INDEX:
        raise Unsupported(
            f"{OP}: the mosaic_gpu kernel takes up to 2^31 slots × heads, got S={dims.S} × H_v={dims.H_v}"
        )
    columns, layout = _tile(K, V, int(knobs["BLOCK_SIZE_V"]), state_dtype)
    tiles, aligned = 1, columns * itemsize % _TMA_BYTES == 0 and V * itemsize % _TMA_BYTES == 0
    if not packed and aligned:
        fit = _MAX_SHARED // (K * columns * itemsize)
        tiles = gcd(V // columns, 1 << (max(1, min(knobs["BLOCK_SIZE_V"] // columns, fit)).bit_length() - 1))
    blocks = (dims.N_seq + packed) * dims.H_v * V // (columns * tiles)
    if blocks > _MAX_GRID:
        raise Unsupported(f"{OP}: the mosaic_gpu kernel takes up to 2^31 - 1 thread blocks, got {blocks}")
    return Launch(columns * tiles, columns, tiles > 1, layout)


def _tile(K: int, V: int, knob: int, state_dtype: Any) -> tuple[int, TileLayout]:
    found: dict[int, TileLayout] = {}
    for columns in range(1, V + 1):
        if V % columns == 0 and K * columns <= _THREAD_ELEMENTS * 128:
            # As for fp32 whatever the state's dtype: the sums along K, which are fp32, cross the warps in vectors of up to
            # 16 bytes.
            layout = choose_layout(K, columns, 4)
            if layout is not None and layout.copies == 1:
                found[columns] = layout
    if not found:
        raise Unsupported(
            f"{OP}: the mosaic_gpu kernel finds no register layout for a [K={K}, V={V}] {jnp.dtype(state_dtype).name} "
            "state: K times a divisor of V has to be a multiple of 128, and K or V divisible by small powers of two"
        )
    columns = max((columns for columns in found if columns <= knob), default=min(found))
    return columns, found[columns]
