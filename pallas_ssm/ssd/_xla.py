"""The SSD operators in plain JAX: for any device and shape, and what gradients are taken of.

Chunked, the whole operator by 128 tokens a chunk whatever the caller's chunks are, and some chunks after the others, so that
temporary memory stops growing at some length.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .._activations_xla import silu
from .._carries_xla import vary_alike
from . import _xla_chunks as layout
from . import _xla_stages as stages
from ._call import Static as Stage
from ._combined_call import Floats, Integers, Results, Static
from ._xla_chunks import Chunks

# Less makes more states, more makes larger [L,L] products; on an H200 their bytes balance here.
_CHUNK = 128
_LEAST_CHUNK = 16

Arrays = dict[str, jax.Array]


# Compiled as a whole also where the caller does not, for one by one its operations would fill the memory.
@partial(jax.jit, static_argnums=0)
def combined(static: Static, floats: Floats, integers: Integers) -> Results:
    dims = static.dims
    if dims.B == 0 or dims.T == 0 or dims.N_seq == 0:
        return _without_tokens(static, floats)
    L = chunk_size(static)
    if integers.cu_seqlens is None:
        chunks = layout.dense(dims.B, dims.T, L, dims.L)
    else:
        chunks = layout.packed(dims.T, L, dims.N_seq, integers.cu_seqlens, outer=dims.L, aligned=static.chunk_aligned)

    def split(tensor: jax.Array) -> jax.Array:
        return chunks.split_aligned(tensor, dims.L) if static.chunk_aligned else chunks.split(tensor)

    x, B, C = (split(tensor) for tensor in (floats.x, floats.B, floats.C))
    a, dt = stages.cumulate(
        chunks.split(floats.dt), floats.A, floats.dt_bias, static.dt_softplus, static.dt_limit, chunks
    )
    z = None if floats.z is None else chunks.split(floats.z)
    several = dims.N_seq > 1
    shape = (dims.H, dims.P, dims.N)
    state = jnp.zeros(shape, jnp.float32)
    if not several and floats.initial_states is not None:
        state = floats.initial_states[0].astype(jnp.float32)
    final = jnp.zeros((dims.N_seq, *shape), jnp.float32) if several and static.return_final_states else None
    kept = jnp.zeros((dims.B * dims.NC, *shape), static.state_dtype) if static.return_intermediate_states else None

    def block(carry: Any, now: Any) -> tuple[Any, jax.Array]:
        begin, state, final, kept = carry
        x, B, C, a, dt, z, slots = now
        passed = stages.pass_on(
            stages.leave(x, B, dt, a, static.precision), a[..., -1], state, slots if several else None,
            floats.initial_states, C.dtype, after=final is not None or kept is not None,
        )  # fmt: skip
        final = _pick(final, chunks.last - begin, passed.after)
        kept = _put(kept, slots.outer, slots.ends, passed.after)
        CB = stages.products(C, B, static.precision)
        y = stages.scan(CB, x, dt, a, C, passed.before, static.precision)
        return (begin + x.shape[0], passed.state, final, kept), _finish(y, x, floats.D, z)

    at_once = stages.chunks_at_once(dims.H, L)
    carry = vary_alike((jnp.int32(0), state, final, kept), (floats, integers))
    (_, state, final, kept), y = stages.over_blocks(block, carry, (x, B, C, a, dt, z, chunks.slots), at_once)
    if static.return_final_states:
        final = (state[None] if final is None else final).astype(static.state_dtype)
    if kept is not None:
        kept = kept.reshape(dims.B, dims.NC, *shape)
    return Results(chunks.join(y), final, kept)


def chunk_size(static: Static) -> int:
    """Tokens of a chunk, of which no result but its rounding depends."""
    dims = static.dims
    L = min(_CHUNK, dims.L) if static.return_intermediate_states else _CHUNK
    while L > _LEAST_CHUNK and L // 2 >= dims.T:
        L //= 2
    return L


def _pick(final: jax.Array | None, index: jax.Array, states: jax.Array | None) -> jax.Array | None:
    """`final` [N_seq,H,P,N] with those that the index finds among [S,H,P,N] states."""
    if final is None or states is None:
        return None
    # Not a scatter of all states, most of which are wanted nowhere, which takes longer. A negative index would count.
    there = (index >= 0) & (index < states.shape[0])
    nowhere = states.shape[0] + jnp.arange(index.shape[0], dtype=index.dtype)
    picked = layout.take(states, jnp.where(there, index, nowhere))
    return jnp.where(there[:, None, None, None], picked.astype(final.dtype), final)


def _put(target: jax.Array | None, index: jax.Array, wanted: jax.Array, states: jax.Array | None) -> jax.Array | None:
    """`target` with the wanted ones of [S,H,P,N] states at their indices, no two of which are the same."""
    if target is None or states is None:
        return None
    nowhere = target.shape[0] + jnp.arange(index.shape[0], dtype=index.dtype)
    index = jnp.where(wanted, index, nowhere)
    return target.at[index].set(states.astype(target.dtype), mode="drop", unique_indices=True)


def _finish(y: jax.Array, x: jax.Array, D: jax.Array | None, z: jax.Array | None) -> jax.Array:
    """[S,L,H,P] in x's dtype from fp32, with D·x and the gate."""
    if D is not None:
        y = y + x.astype(jnp.float32) * (D if D.ndim == 2 else D[:, None]).astype(jnp.float32)
    if z is not None:
        y = y * silu(z.astype(jnp.float32))
    return y.astype(x.dtype)


def _without_tokens(static: Static, floats: Floats) -> Results:
    dims = static.dims
    shape, dtype = (dims.H, dims.P, dims.N), static.state_dtype
    given = floats.initial_states
    final = jnp.zeros((dims.N_seq, *shape), dtype) if given is None else given.astype(dtype)
    kept = jnp.zeros((dims.B, dims.NC, *shape), dtype) if static.return_intermediate_states else None
    y = jnp.zeros((dims.B, dims.T, dims.H, dims.P), floats.x.dtype)
    return Results(y, final if static.return_final_states else None, kept)


@partial(jax.jit, static_argnums=0)
def stage(static: Stage, floats: Arrays, cu_seqlens: jax.Array | None) -> Any:
    """What the public function of this stage returns."""
    dims = static.dims
    if dims.B == 0 or dims.T == 0 or dims.N_seq == 0:
        return _stage_without_tokens(static, floats)
    if cu_seqlens is None:
        chunks = layout.dense(dims.B, dims.T, dims.L)
    else:
        chunks = layout.packed(dims.T, dims.L, dims.N_seq, cu_seqlens)
    run = {
        "chunk_cumsum": _chunk_cumsum,
        "chunk_state": _chunk_state,
        "state_passing": _state_passing,
        "bmm_chunk": _bmm_chunk,
        "chunk_scan": _chunk_scan,
    }[static.op]
    return run(static, floats, chunks)


def _chunk_cumsum(static: Stage, floats: Arrays, chunks: Chunks) -> tuple[jax.Array, jax.Array]:
    a, dt = stages.cumulate(
        chunks.split(floats["dt"]), floats["A"], floats.get("dt_bias"), static.dt_softplus, static.dt_limit, chunks
    )
    shape = (static.dims.B, static.dims.NC, *a.shape[1:])
    return a.reshape(shape).swapaxes(1, 2), dt.reshape(shape).swapaxes(1, 2)


def _chunk_state(static: Stage, floats: Arrays, chunks: Chunks) -> jax.Array:
    x, B = chunks.split(floats["x"]), chunks.split(floats["B"])
    states = stages.leave(x, B, _slots(floats["dt"]), _slots(floats["dA_cumsum"]), static.precision)
    return states.reshape(static.dims.B, static.dims.NC, *states.shape[1:])


def _state_passing(static: Stage, floats: Arrays, chunks: Chunks) -> tuple[jax.Array, jax.Array]:
    dims = static.dims
    states, total = floats["states"], _slots(floats["dA_cumsum"])[..., -1]
    shape = states.shape[2:]

    def block(carry: Any, now: Any) -> tuple[Any, jax.Array]:
        begin, state, final = carry
        states, total, slots = now
        passed = stages.pass_on(
            states, total, state, slots, floats.get("initial_states"), static.state_dtype, after=True, guard=True
        )
        final = _pick(final, chunks.last - begin, passed.after)
        return (begin + states.shape[0], passed.state, final), jnp.concatenate(passed.before)

    final = jnp.zeros((dims.N_seq, *shape), static.state_dtype)
    carry = vary_alike((jnp.int32(0), jnp.zeros(shape, jnp.float32), final), (floats, chunks.slots))
    given = states.reshape(chunks.S, *shape), total, chunks.slots
    (*_, final), before = stages.over_blocks(block, carry, given, stages.chunks_at_once(1, 1))
    return before.reshape(states.shape), final


def _bmm_chunk(static: Stage, floats: Arrays, chunks: Chunks) -> jax.Array:
    CB = stages.products(chunks.split(floats["C"]), chunks.split(floats["B"]), static.precision)
    return CB.reshape(static.dims.B, static.dims.NC, *CB.shape[1:])


def _chunk_scan(static: Stage, floats: Arrays, chunks: Chunks) -> jax.Array:
    dims = static.dims
    x, C = chunks.split(floats["x"]), chunks.split(floats["C"])
    dt, a = _slots(floats["dt"]), _slots(floats["dA_cumsum"])
    CB, states = (floats[name].reshape(chunks.S, *floats[name].shape[2:]) for name in ("CB", "states"))
    z = chunks.split(floats["z"]) if "z" in floats else None

    def block(carry: None, now: Any) -> tuple[None, jax.Array]:
        CB, x, dt, a, C, states, z = now
        y = stages.scan(CB, x, dt, a, C, [states], static.precision)
        return carry, _finish(y, x, floats.get("D"), z)

    at_once = stages.chunks_at_once(dims.H, dims.L, chunks.S)
    _, y = stages.over_blocks(block, None, (CB, x, dt, a, C, states, z), at_once)
    return chunks.join(y)


def _slots(chunked: jax.Array) -> jax.Array:
    """[S,H,L] from [B,H,NC,L]."""
    B, H, NC, L = chunked.shape
    return chunked.swapaxes(1, 2).reshape(B * NC, H, L)


def _stage_without_tokens(static: Stage, floats: Arrays) -> Any:
    d = static.dims
    if static.op == "chunk_scan":
        return jnp.zeros_like(floats["x"])
    if static.op == "state_passing":
        states, dtype = floats["states"], static.state_dtype
        initial = floats.get("initial_states", jnp.zeros((d.N_seq, *states.shape[2:]), jnp.float32))
        return jnp.zeros(states.shape, dtype), initial.astype(dtype)
    if static.op == "chunk_cumsum":
        return (jnp.zeros((d.B, d.H, d.NC, d.L), jnp.float32),) * 2
    shape = (d.B, d.NC, d.G, d.L, d.L) if static.op == "bmm_chunk" else (d.B, d.NC, d.H, d.P, d.N)
    return jnp.zeros(shape, jnp.float32)
