"""The Mosaic GPU kernel of `state_passing`: a warpgroup carries some elements of a head's state along its sequence's chunks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._numerics import exp
from ._call import Static

# Elements of a state that a warpgroup may carry: 1 to 8 a thread.
_TILES = (1024, 512, 256, 128)


def unsupported(static: Static) -> str | None:
    P, N = static.dims.P, static.dims.N
    if P * N % _TILES[-1]:
        return f"needs P x N divisible by {_TILES[-1]}, got P={P}, N={N}"
    return None


def run(
    static: Static, states: jax.Array, dA_cumsum: jax.Array, initial_states: jax.Array | None, cu_seqlens: jax.Array | None,
    final_dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(before, final), both in `static.state_dtype` unless `final_dtype` is another."""
    dims, dtype = static.dims, jnp.dtype(static.state_dtype)
    final_dtype = final_dtype or dtype
    B, NC, H, P, N = states.shape
    size = next(tile for tile in _TILES if P * N % tile == 0)
    tiles = P * N // size
    given = {"initial": initial_states, "cu_seqlens": cu_seqlens}
    given = {name: array for name, array in given.items() if array is not None}
    if "initial" in given:
        given["initial"] = given["initial"].reshape(dims.N_seq, H, P * N)

    def body(states: Any, dA_cumsum: Any, *refs: Any) -> None:
        inputs, (before, final) = dict(zip(given, refs, strict=False)), refs[len(given) :]
        block = lax.axis_index("block")
        n, h, some = block // (tiles * H), block // tiles % H, pl.ds(block % tiles * size, size)
        b, slot, count = n, 0, NC
        if dims.packed:
            b = 0
            slot, count = _slots(dims, inputs["cu_seqlens"], n, NC)
        if "initial" in inputs:
            carry = inputs["initial"][n, h, some].astype(jnp.float32)
        else:
            carry = plgpu.layout_cast(
                jnp.zeros((size,), jnp.float32), plgpu.Layout.WG_STRIDED((size,), vec_size=size // 128)
            )

        def one(c: jax.Array, carry: jax.Array) -> jax.Array:
            before[b, slot + c, h, some] = carry.astype(dtype)
            return carry * exp(dA_cumsum[b, h, slot + c, dims.L - 1]) + states[b, slot + c, h, some]

        final[n, h, some] = lax.fori_loop(0, count, one, carry).astype(final_dtype)

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((B, NC, H, P * N), dtype),
            jax.ShapeDtypeStruct((dims.N_seq, H, P * N), final_dtype),
        ),
        grid=(tiles * H * dims.N_seq,),
        grid_names=("block",),
        kernel_name="ssd_state_passing",
    )
    before, final = kernel(states.reshape(B, NC, H, P * N), dA_cumsum, *given.values())
    return before.reshape(states.shape), final.reshape(dims.N_seq, H, P, N)


def _slots(dims: Any, cu_seqlens: Any, n: jax.Array, NC: int) -> tuple[jax.Array, jax.Array]:
    """(first slot, chunks) of sequence n. T is not known here, but no slot past the last is touched, whatever the bounds."""
    begin = jnp.where(n == 0, 0, jnp.maximum(cu_seqlens[n], 0))
    length = jnp.maximum(cu_seqlens[n + 1] - begin, 0)
    slot = jnp.minimum(lax.div(begin, jnp.int32(dims.L)) + n, NC)
    return slot, jnp.minimum(lax.div(length + (dims.L - 1), jnp.int32(dims.L)), NC - slot)
