"""The gated delta rule's operators in plain JAX: for any device and shape, and what gradients are taken of.

Chunked: memory grows with T·L a value head and with a state for each chunk, time with the chunks of all sequences.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from . import _xla_stages as stages
from ._call import Floats, Static
from ._xla_chunks import Chunks, chunked
from ._xla_inverse import invert
from ._xla_stages import Gate, gate_of


# Compiled as a whole also where the caller does not, for one by one its operations would fill the memory.
@partial(jax.jit, static_argnums=0)
def forward(static: Static, floats: Floats, cu_seqlens: jax.Array | None) -> Any:
    """What the public function returns."""
    dims = static.dims
    if dims.B == 0 or dims.T == 0 or dims.N_seq == 0:
        return _without_tokens(static, floats)
    return _FORMS[static.op](static, floats, chunked(dims.T, tokens_of_a_chunk(static), dims.N_seq, cu_seqlens))


def tokens_of_a_chunk(static: Static) -> int:
    """The caller's chunk size; of the combined operator, of whose chunks nothing but rounding is seen, twice that.

    Half as many states to pass on, one after the other, are worth the larger triangles, unless sequences are so short that
    these would be empty.
    """
    dims = static.dims
    twice = static.op == "chunk_gated_delta_rule" and dims.B * dims.T >= 2 * dims.L * dims.N_seq
    return 2 * dims.L if twice else dims.L


def _chunk_local_cumsum(static: Static, floats: Floats, chunks: Chunks) -> jax.Array:
    return chunks.join(stages.cumulate(chunks.split(floats["g"])))


def _chunk_scaled_dot_kkt(static: Static, floats: Floats, chunks: Chunks) -> jax.Array:
    k, beta = (chunks.split(floats[name]) for name in ("k", "beta"))
    return chunks.join(stages.kkt(k, beta, gate_of(chunks, floats.get("g")), static.precision))


def _solve_tril(static: Static, floats: Floats, chunks: Chunks) -> jax.Array:
    return chunks.join(invert(chunks.split(floats["A"])).astype(static.out_dtype))


def _recompute_w_u(static: Static, floats: Floats, chunks: Chunks) -> tuple[jax.Array, jax.Array]:
    k, v, beta, A = (chunks.split(floats[name]) for name in ("k", "v", "beta", "A"))
    w, u = stages.w_and_u(k, v, beta, A, gate_of(chunks, floats.get("g")), static.precision)
    return chunks.join(w), chunks.join(u)


def _chunk_delta_h(static: Static, floats: Floats, chunks: Chunks) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    k, w, u = (chunks.split(floats[name]) for name in ("k", "w", "u"))
    gate, initial = gate_of(chunks, floats.get("g")), floats.get("initial_state")
    h, v_new, final = stages.pass_on(k, w, u, gate, initial, chunks, static.dims.N_seq, static.precision)
    return jnp.moveaxis(h, 0, 1), chunks.join(v_new), final


def _chunk_o(static: Static, floats: Floats, chunks: Chunks) -> jax.Array:
    q, k, v = (chunks.split(floats[name]) for name in ("q", "k", "v"))
    h = jnp.moveaxis(floats["h"], 1, 0)
    h = jnp.swapaxes(h, 3, 4) if static.state_layout == "VK" else h
    gate = gate_of(chunks, floats.get("g"), static.gate_base)
    return chunks.join(stages.outputs(q, k, v, h, gate, static.scale, static.precision))


def _combined(static: Static, floats: Floats, chunks: Chunks) -> tuple[jax.Array, jax.Array | None]:
    q, k, v, g, beta = (chunks.split(floats[name]) for name in ("q", "k", "v", "g", "beta"))
    if static.use_qk_l2norm:
        q, k = stages.l2norm(q), stages.l2norm(k)
    gate, precision = Gate(stages.cumulate(g)), static.precision
    inverse = invert(stages.kkt(k, beta, gate, precision))
    w, u = stages.w_and_u(k, v, beta, inverse, gate, precision)
    h, v_new, final = stages.pass_on(
        k, w, u, gate, floats.get("initial_state"), chunks, static.dims.N_seq, precision, static.return_final_state
    )
    return chunks.join(stages.outputs(q, k, v_new, h, gate, static.scale, precision)), final


_FORMS = {
    "chunk_local_cumsum": _chunk_local_cumsum,
    "chunk_scaled_dot_kkt": _chunk_scaled_dot_kkt,
    "solve_tril": _solve_tril,
    "recompute_w_u": _recompute_w_u,
    "chunk_delta_h": _chunk_delta_h,
    "chunk_o": _chunk_o,
    "chunk_gated_delta_rule": _combined,
}


def _without_tokens(static: Static, floats: Floats) -> Any:
    """Zeros, and states as they came."""
    dims = static.dims
    rows = (dims.B, dims.T, dims.H_v)

    def final() -> jax.Array:
        if "initial_state" in floats:
            return floats["initial_state"].astype(jnp.float32)
        return jnp.zeros((dims.N_seq, dims.H_v, dims.K, dims.V), jnp.float32)

    match static.op:
        case "chunk_local_cumsum":
            return jnp.zeros(rows, jnp.float32)
        case "chunk_scaled_dot_kkt" | "solve_tril":
            return jnp.zeros((*rows, dims.L), static.out_dtype)
        case "recompute_w_u":
            dtype = floats["k"].dtype
            return jnp.zeros((*rows, dims.K), dtype), jnp.zeros((*rows, dims.V), dtype)
        case "chunk_delta_h":
            h = jnp.zeros((dims.B, dims.NC, dims.H_v, dims.K, dims.V), floats["k"].dtype)
            return h, jnp.zeros_like(floats["u"]), final()
        case "chunk_o":
            return jnp.zeros_like(floats["v"])
    return jnp.zeros_like(floats["v"]), final() if static.return_final_state else None
