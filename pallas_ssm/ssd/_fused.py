"""The fused path of `mamba_chunk_scan_combined`: one Mosaic GPU kernel, and one before it where sequences are in pieces.

A piece is scanned from the state that the pieces before it leave, which the kernel before computes piece by piece, reading
x, B and dt once more (`_fused_ends`). Without pieces there is only the one (`_fused_scan`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from .._selective_state_update_launch import Unsupported
from . import _fused_ends, _fused_scan
from ._combined_call import Floats, Integers, Results, Static
from ._fused_block import DT_HEADS, Shape
from ._fused_pieces import CHUNK, Cut, cut
from ._tiles import COLUMNS

OP = "mamba_chunk_scan_combined"

_WIDTHS = (64, 128, 256)
_MAX_GRID = 2**31 - 1
_MAX_ROWS = 2**31 - 1 - 1024
# Shared memory that a block can have, less what rounding every array up to 1 KB may take.
_MAX_SHARED = 232448 - 4 * 1024


@dataclass(frozen=True)
class Launch:
    """A launch as it will be; the table's knobs may have given way to what fits (`plan`)."""

    FUSED: bool
    CHUNKS_PER_PIECE: int
    HEADS_PER_BLOCK: int
    """1 as well where two heads have not all of a group, or more state than registers."""
    STATES_PER_PIECE: int
    """Fewer where some of them would have no chunk of the piece; 1 as well where there is one piece a sequence."""
    num_stages: int
    """Chunks in shared memory; beside the tiles of a gate as many as still fit."""
    scores: int
    """Warpgroups that compute the products within a chunk."""
    cut: Cut


def plan(static: Static, device: Any, config: Mapping[str, Any]) -> Launch:
    """The launch nearest to `config` that this call has; `Unsupported` without any."""
    dims = static.dims

    def refuse(reason: str) -> Unsupported:
        return Unsupported(f"{OP}: the mosaic_gpu kernel {reason}")

    if device.capability != (9, 0):
        raise refuse(f"needs compute capability 9.0, got {device.capability} ({device.name})")
    if static.dtype not in ("bfloat16", "float16"):
        raise refuse(f"takes 16-bit inputs, got {static.dtype}")
    if dims.N not in _WIDTHS:
        raise refuse(f"needs N in {_WIDTHS}, got {dims.N}")
    if dims.P < COLUMNS or dims.P % 8:
        raise refuse(f"needs P in multiples of 8 from {COLUMNS} on, got {dims.P}")
    if static.return_intermediate_states and dims.L < CHUNK:
        raise refuse(f"keeps states of chunks of {CHUNK} tokens and more, got chunk_size={dims.L}")
    if dims.B == 0 or dims.T == 0 or dims.N_seq == 0:
        raise refuse("needs a token")
    if max(dims.B * dims.T, dims.rows) > _MAX_ROWS:
        raise refuse(f"takes up to 2^31 rows, got B={dims.B} × T={dims.T}")
    pieces = cut(static, int(config["CHUNKS_PER_PIECE"]), int(config.get("STATES_PER_PIECE", 1)))
    pairs = dims.N <= 128 and dims.H // dims.G % 2 == 0
    heads = int(config.get("HEADS_PER_BLOCK", 1)) if pairs else 1
    # A second warpgroup for one head's products; two heads' states leave no registers for it.
    scores = 1 if dims.N > 128 or heads > 1 else 2
    shape = _shape(static, pieces, int(config["num_stages"]), heads, scores, gate=False)
    if shape.blocks(pieces.shares) > _MAX_GRID:
        raise refuse("takes up to 2^31 - 1 thread blocks")
    return Launch(True, pieces.tokens // CHUNK, heads, pieces.shares, shape.stages, scores, pieces)


def run(static: Static, launch: Launch, floats: Floats, integers: Integers) -> Results:
    dims = static.dims
    gate = floats.z is not None
    shape = _shape(static, launch.cut, launch.num_stages, launch.HEADS_PER_BLOCK, launch.scores, gate)
    arrays = {name: array for name, array in floats._asdict().items() if array is not None}
    # The state in whole tiles of channels, and dt in rows of whole 16 bytes, as TMA wants them. Most shapes have both.
    channels, heads = shape.parts * COLUMNS, 16 // floats.dt.dtype.itemsize
    arrays["dt"] = _pad(floats.dt, 2, -(-dims.H // heads) * heads)
    if floats.initial_states is not None:
        arrays["initial_states"] = _pad(floats.initial_states, 2, channels)
    if floats.D is not None and floats.D.ndim == 2:
        arrays["D"] = _pad(floats.D, 1, channels)
    if integers.cu_seqlens is not None:
        arrays["cu_seqlens"] = integers.cu_seqlens
    if launch.cut.several:
        names = ("x", "dt", "A", "B", "dt_bias", "cu_seqlens")
        ends = _fused_ends.run(shape, {name: arrays[name] for name in names if name in arrays})
        arrays["ends"], arrays["totals"] = ends
    outputs = {"y": jax.ShapeDtypeStruct((dims.B, dims.T, dims.H, dims.P), floats.x.dtype)}
    states = (dims.H, channels, dims.N)
    if static.return_final_states:
        outputs["final"] = jax.ShapeDtypeStruct((dims.N_seq, *states), jnp.dtype(static.state_dtype))
    if static.return_intermediate_states:
        outputs["intermediate"] = jax.ShapeDtypeStruct((dims.B, dims.NC, *states), jnp.dtype(static.state_dtype))
    results = _fused_scan.run(shape, arrays, outputs)
    final, intermediate = results.get("final"), results.get("intermediate")
    if channels != dims.P:
        final = None if final is None else final[:, :, : dims.P]
        intermediate = None if intermediate is None else intermediate[:, :, :, : dims.P]
    return Results(results["y"], final, intermediate)


def _pad(array: jax.Array, axis: int, size: int) -> jax.Array:
    if array.shape[axis] == size:
        return array
    return jnp.pad(array, [(0, size - n if i == axis else 0) for i, n in enumerate(array.shape)])


def _shape(static: Static, cut: Cut, stages: int, heads: int, scores: int, gate: bool) -> Shape:
    """With as many chunks as fit.

    Two warpgroups that take turns see every other chunk, and have to see every phase of a slot's barrier: they take an even
    number of slots.
    """
    tile = CHUNK * COLUMNS * 2
    shape = Shape(static, cut, stages, heads, scores, dt_chunks=4 // heads)
    fixed = 4 * heads * tile + 2 * shape.dt_chunks * CHUNK * DT_HEADS * 4  # M and y twice; dt
    each = (heads * (1 + gate) + 2 * static.dims.N // COLUMNS) * tile + heads * 4 * CHUNK * 4
    while stages > scores and (stages % scores or fixed + stages * each > _MAX_SHARED):
        stages -= 1
    return replace(shape, stages=stages)
