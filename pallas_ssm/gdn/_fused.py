"""The fused path of `chunk_gated_delta_rule`: two Mosaic GPU kernels.

`_fused_prepare` does all that needs no state, for all chunks at once; `_fused_loop` carries the states through the chunks and
computes the outputs on the way. XLA cuts g and beta, a hundredth of what is read, into chunks. Where there are few heads
`_fused_ends` stands between them, and the second has all segments of the sequences at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ssm_configs import Device
from ssm_configs.contracts.gdn_segments import segment_of

from .._selective_state_update_launch import Unsupported
from ..ssd._tiles import COLUMNS
from . import _fused_between, _fused_ends, _fused_loop, _fused_prepare
from ._call import Floats, Static
from ._fused_shape import CHUNK, Shape
from ._xla_chunks import chunked

OP = "chunk_gated_delta_rule"
CAPABILITY = (9, 0)

_MAX_K, _MAX_V = 128, 256
_MAX_STAGES = 3
# Thread blocks, and tiles of an array.
_MAX_COUNT = 2**31 - 1
_MAX_ROWS = 2**31 - 1 - 1024


@dataclass(frozen=True)
class Launch:
    HEADS: int
    """Value heads of one block that prepares; they divide those of a key head."""
    num_stages: int
    """Chunks in shared memory of a block that carries a state."""
    segment: int
    """Chunks of a sequence's segments."""


def plan(static: Static, arrays: Mapping[str, Any], device: Device) -> Launch:
    dims, dtype = static.dims, jnp.dtype(arrays["q"].dtype)
    launch = Launch(2 if dims.H_v // dims.H_k % 2 == 0 else 1, _MAX_STAGES, segment_of(dims))
    reason = None
    if device.capability != CAPABILITY:
        reason = f"needs compute capability 9.0, got {device.capability} ({device.name})"
    elif dtype.itemsize != 2:
        reason = f"takes 16-bit inputs, got {dtype.name}"
    elif dims.L != CHUNK:
        reason = f"needs chunk_size={CHUNK}, got {dims.L}"
    elif dims.K % COLUMNS or dims.K > _MAX_K:
        reason = f"needs K in multiples of {COLUMNS} up to {_MAX_K}, got {dims.K}"
    elif dims.V % COLUMNS or dims.V > _MAX_V:
        reason = f"needs V in multiples of {COLUMNS} up to {_MAX_V}, got {dims.V}"
    elif dims.B * dims.T > _MAX_ROWS:
        reason = f"takes up to 2^31 rows, got B={dims.B} × T={dims.T}"
    else:
        shape = _shape(static, launch, dtype)
        if max(shape.tiles.shape[0], shape.loop_blocks) > _MAX_COUNT:
            reason = "takes up to 2^31 - 1 tiles of Y and PX"
    if reason is not None:
        raise Unsupported(f"{OP}: the mosaic_gpu kernel {reason}")
    return launch


def run(
    static: Static, launch: Launch, floats: Floats, cu_seqlens: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    dims = static.dims
    shape = _shape(static, launch, floats["q"].dtype)
    bounds = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    chunks = chunked(dims.T, CHUNK, dims.N_seq, cu_seqlens)
    gates = {name: chunks.split(floats[name].astype(jnp.float32)) for name in ("g", "beta")}
    keys = {name: floats[name] for name in "qk"}
    prepared = keys | {"v": floats["v"]} | _fused_prepare.run(shape, keys | gates | bounds)
    outputs = {"o": jax.ShapeDtypeStruct(floats["v"].shape, floats["v"].dtype)}
    if static.return_final_state:
        outputs["final"] = jax.ShapeDtypeStruct((shape.segments, dims.H_v, dims.V, dims.K), jnp.float32)
    initial = jnp.swapaxes(floats["initial_state"], 2, 3) if "initial_state" in floats else None
    if shape.cut:
        initial = _fused_between.states(shape, _fused_ends.run(shape, prepared | bounds), initial, cu_seqlens)
    if initial is not None:
        prepared["initial_state"] = initial
    results = _fused_loop.run(shape, prepared | bounds, outputs)
    if "final" not in results:
        return results["o"], None
    final = results["final"][_fused_between.lasts(shape, cu_seqlens)] if shape.cut else results["final"]
    return results["o"], jnp.swapaxes(final, 2, 3)


def _shape(static: Static, launch: Launch, dtype: Any) -> Shape:
    return Shape(static, jnp.dtype(dtype), launch.HEADS, launch.num_stages, launch.segment)
