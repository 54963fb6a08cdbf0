"""The Mosaic GPU kernel of `chunk_o`: a warpgroup computes one chunk of value heads that share a query and key head.

The operator reads three times what its products would take, so everything here is about memory: q·k^T is computed once for
those value heads, v and h arrive in tiles of 64 columns, `num_stages` of them under way at a time, and shared memory is small
enough for two blocks an SM, of which one loads while the other multiplies. Outputs leave through the memory of k, which
nobody reads after q·k^T.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ssm_configs import Device

from .._branches import when
from .._selective_state_update_launch import Unsupported
from ..ssd._tiles import ACC, ACROSS, COLUMNS, LAYOUT, ROWS, across, down, indices, load, locate, store_rows
from ._call import Floats, Static
from ._xla_stages import Gate

OP = "gdn.chunk_o"
CAPABILITY = (9, 0)

_MAX_GRID = 2**31 - 1
# [64,64] tiles of the output that one block computes: the kernel is unrolled over them.
_MAX_TILES = 4
# Elements of g that TMA can begin at.
_GATES = 4


@dataclass(frozen=True)
class Launch:
    HEADS: int
    """Value heads of one block; they divide those of a key head."""
    num_stages: int
    """Tiles of v and h, 64 columns each, on their way into shared memory."""


def plan(static: Static, arrays: Mapping[str, Any], device: Device) -> Launch:
    dims, dtype = static.dims, jnp.dtype(arrays["q"].dtype)
    reason = None
    if device.capability != CAPABILITY:
        reason = f"needs compute capability 9.0, got {device.capability} ({device.name})"
    elif dtype.itemsize != 2:
        reason = f"takes 16-bit inputs, got {dtype.name}"
    elif dims.L != ROWS:
        reason = f"needs chunk_size={ROWS}, got {dims.L}"
    elif dims.K % COLUMNS or dims.V % COLUMNS:
        reason = f"needs K and V in multiples of {COLUMNS}, got K={dims.K}, V={dims.V}"
    elif dims.V > _MAX_TILES * COLUMNS:
        reason = f"takes V up to {_MAX_TILES * COLUMNS}, got {dims.V}"
    elif dims.B * dims.NC * dims.H_v > _MAX_GRID:
        reason = "takes up to 2^31 - 1 thread blocks"
    if reason is not None:
        raise Unsupported(f"{OP}: the mosaic_gpu kernel {reason}")
    parts, shared = dims.V // COLUMNS, dims.H_v // dims.H_k
    heads = max(heads for heads in range(1, _MAX_TILES // parts + 1) if shared % heads == 0)
    return Launch(heads, min(2, heads * parts))


def run(static: Static, launch: Launch, floats: Floats, cu_seqlens: jax.Array | None) -> jax.Array:
    dims: Any = static.dims  # of SSD's or these, `locate` looks at what both have
    stages = launch.num_stages
    q, v = floats["q"], floats["v"]
    heads, pieces, parts = launch.HEADS, dims.K // COLUMNS, dims.V // COLUMNS
    arrays = {"q": q, "k": floats["k"], "v": v, "h": floats["h"].astype(q.dtype)}
    # Columns of g that hold those of `heads` value heads, though they begin at a multiple of 16 bytes.
    gates = -(-(heads + (_GATES - 1 if heads % _GATES else 0)) // 8) * 8
    if "g" in floats:
        columns = max(gates, -(-dims.H_v // _GATES) * _GATES)
        # Whole tiles of 8 rows: Mosaic GPU may lay g out so in shared memory.
        arrays["g"] = jnp.pad(floats["g"], ((0, 0), (0, -dims.T % 8), (0, columns - dims.H_v)))
    if cu_seqlens is not None:
        arrays["cu_seqlens"] = cu_seqlens
    decay = Gate(None, static.gate_base).exp

    def body(*refs: Any) -> None:
        ref = dict(zip(arrays, refs, strict=False))
        o, q_s, k_s, v_s, h_s, g_s, gate_s, ready, arrived = refs[len(arrays) :]
        block = lax.axis_index("block")
        groups = dims.H_v // heads
        first_head, slot, b = block % groups * heads, block // groups % dims.NC, block // (groups * dims.NC)
        h_k = lax.div(first_head, jnp.int32(dims.H_v // dims.H_k))
        where = locate(dims, ref.get("cu_seqlens"), b, slot)
        tokens = pl.ds(where.begin, ROWS)
        first_gate = lax.div(first_head, jnp.int32(_GATES)) * _GATES

        def fetch_heads(unit: int) -> None:
            stage, head = unit % stages, first_head + unit // parts
            columns = pl.ds(unit % parts * COLUMNS, COLUMNS)
            plgpu.copy_gmem_to_smem(ref["v"].at[b, tokens, head, columns], v_s[0].at[stage], arrived.at[stage])
            for piece in range(pieces):
                rows = pl.ds(piece * COLUMNS, COLUMNS)
                at = (rows, columns) if static.state_layout == "KV" else (columns, rows)
                source = ref["h"].at[b, slot, head, *at]
                plgpu.copy_gmem_to_smem(source, h_s.at[stage * pieces + piece], arrived.at[stage])

        @when(where.length > 0)
        def _():
            for name, target in (("q", q_s), ("k", k_s)):
                for piece in range(pieces):
                    columns = pl.ds(piece * COLUMNS, COLUMNS)
                    plgpu.copy_gmem_to_smem(ref[name].at[b, tokens, h_k, columns], target[0].at[piece], ready)
            if "g" in ref:
                plgpu.copy_gmem_to_smem(ref["g"].at[b, tokens, pl.ds(first_gate, gates)], g_s, ready)
            for unit in range(stages):
                fetch_heads(unit)
            plgpu.barrier_wait(ready)
            gate_down = []
            if "g" in ref:
                rows = load(g_s, layout=LAYOUT)
                for head in range(heads):
                    own = indices(1, gates) == first_head + head - first_gate
                    gate_down.append(jnp.sum(jnp.where(own, rows, 0.0), axis=1))
                    # From one layout to the other by way of memory. (Not both from there: equal loads become one.)
                    gate_s.at[head][...] = gate_down[head]
                plgpu.commit_smem()

            def scores(accumulator: Any) -> jax.Array:
                for piece in range(pieces):
                    plgpu.wgmma(accumulator, q_s[1].at[piece], k_s[1].at[piece].transpose((1, 0)))
                return accumulator[...]

            products = pl.run_scoped(scores, ACC((ROWS, ROWS), jnp.float32))
            pairs = indices(0) >= indices(1)
            weights, since = products, None
            for unit in range(heads * parts):
                stage, head = unit % stages, first_head + unit // parts
                if unit % parts == 0:
                    weights = products
                    if "g" in ref:
                        g_down = gate_down[unit // parts]
                        g_across = load(gate_s.at[unit // parts], layout=ACROSS)
                        since = decay(g_down)
                        # Before the exp: gates may be of either sign.
                        difference = jnp.where(pairs, down(g_down, ROWS) - across(g_across, ROWS), 0.0)
                        weights = weights * decay(difference)
                    weights = jnp.where(pairs, weights, 0.0).astype(v.dtype)
                plgpu.barrier_wait(arrived.at[stage])
                _clear_rows(v_s[1].at[stage], where.length)

                def outputs(carried: Any, own: Any, stage=stage, weights=weights) -> tuple[jax.Array, jax.Array]:
                    for piece in range(pieces):
                        state = h_s.at[stage * pieces + piece]
                        state = state if static.state_layout == "KV" else state.transpose((1, 0))
                        plgpu.wgmma(carried, q_s[1].at[piece], state)
                    plgpu.wgmma(own, weights, v_s[1].at[stage])
                    return carried[...], own[...]

                tile = ACC((ROWS, COLUMNS), jnp.float32)
                carried, own = pl.run_scoped(outputs, tile, tile)
                if unit + stages < heads * parts:
                    fetch_heads(unit + stages)
                if since is not None:
                    carried = carried * down(since, COLUMNS)
                rows = ((carried + own) * static.scale).astype(v.dtype)
                target = o.at[b, :, head, pl.ds(unit % parts * COLUMNS, COLUMNS)]
                _store(rows, k_s, unit % pieces, target, where, dims.packed, pieces)
            plgpu.wait_smem_to_gmem(0)

        if dims.packed:
            _zero_padding(dims, ref["cu_seqlens"], k_s[2].at[0], o.at[b], slot, first_head, heads, parts)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(v.shape, v.dtype),
        scratch_types=[
            _tile(pieces, q.dtype), _tile(pieces, q.dtype), _tile(stages, q.dtype),
            plgpu.SMEM((stages * pieces, COLUMNS, COLUMNS), q.dtype, transforms=(_TILING, _SWIZZLE)),
            plgpu.SMEM((ROWS, gates), jnp.float32),
            plgpu.SMEM((heads, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * pieces + ("g" in arrays)),
            plgpu.Barrier(num_arrivals=1 + pieces, num_barriers=stages),
        ],
        grid=(dims.B * dims.NC * dims.H_v // heads,),
        grid_names=("block",),
        kernel_name="gdn_chunk_o",
    )  # fmt: skip
    return kernel(*arrays.values())


_SWIZZLE = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
_TILING = plgpu.TilingTransform((8, COLUMNS))  # pyright: ignore[reportAbstractUsage]


def _tile(pieces: int, dtype: Any) -> Any:
    """(view for TMA, view for wgmma, plain view) of one piece of shared memory, [pieces,64,64].

    Mosaic GPU lets TMA write a tiled view only where it can prove that the first row is a multiple of 8, which the first token
    of a packed sequence is not. Rows of 128 swizzled bytes lie the same with the tiling and without.
    """
    shape, dtype = (pieces, ROWS, COLUMNS), jnp.dtype(dtype)
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=(_SWIZZLE,)),
        plgpu.SMEM(shape, dtype, transforms=(_TILING, _SWIZZLE)),
        plgpu.SMEM(shape, dtype),
    )


def _clear_rows(tile: Any, length: jax.Array) -> None:
    """Rows at or past `length` become zero: they are other sequences' tokens, and may be NaN."""

    @when(length < ROWS)
    def _():
        rows = load(tile, layout=LAYOUT)
        tile[...] = jnp.where(indices(0) < length, rows, jnp.zeros_like(rows))
        plgpu.commit_smem()


def _store(rows: jax.Array, views: Any, piece: int, o: Any, where: Any, packed: bool, pieces: int) -> None:
    """The chunk's tokens of `rows` to o [T,64], by way of one of `pieces` tiles: all but the last stores have been read."""
    swizzled, tiled, plain = (view.at[piece] for view in views)
    plgpu.wait_smem_to_gmem(pieces - 1, wait_read_only=True)

    def whole() -> None:
        tiled[...] = rows
        plgpu.commit_smem()
        # Rows past T are not written.
        plgpu.copy_smem_to_gmem(swizzled, o.at[pl.ds(where.begin, ROWS)])

    if not packed:
        whole()
        return
    when(where.length >= ROWS)(whole)

    @when(where.length < ROWS)
    def _():
        plain[...] = rows
        plgpu.commit_smem()
        store_rows(plain, o, where.begin, where.length)
        plgpu.wait_smem_to_gmem(0)


def _zero_padding(
    dims: Any, cu_seqlens: Any, rows: Any, o: Any, slot: jax.Array, first_head: jax.Array, heads: int, parts: int
) -> None:
    """Tokens past the last sequence: those that this block would have if the sequences began at token 0."""
    end = jnp.clip(cu_seqlens[dims.N_seq], 0, dims.T)
    first = jnp.maximum(slot * ROWS, end)
    count = jnp.minimum(dims.T, (slot + 1) * ROWS) - first

    @when(count > 0)
    def _():
        rows[...] = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), rows.dtype), LAYOUT)
        plgpu.commit_smem()
        for head in range(heads):
            for part in range(parts):
                store_rows(rows, o.at[:, first_head + head, pl.ds(part * COLUMNS, COLUMNS)], first, count)
        plgpu.wait_smem_to_gmem(0)
