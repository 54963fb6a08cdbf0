"""The six stages on chunks, in plain JAX, all chunks and heads at a time; only the state goes from chunk to chunk in a loop.

Chunked arrays are [NC,B,H,L,…] as `Chunks.split` gives them, with zeros in places without a token. Products take their operands
in the inputs' dtype and sum in fp32; what value heads share of q and k is computed once.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._carries_xla import vary_alike
from .._numerics import LOG2E
from ._xla_chunks import Chunks
from ._xla_pool import put_in_pool, take_from_pool

# Chunks that one step of the loop takes: a step of a loop on a GPU costs time whatever it does.
_UNROLL = 4
_EPS = 1e-6


def per_value_head(tensor: jax.Array, H_v: int) -> jax.Array:
    """[NC,B,H_v,…] from [NC,B,H_k,…]."""
    return jnp.repeat(tensor, H_v // tensor.shape[2], axis=2)


def product(equation: str, left: jax.Array, right: jax.Array, precision: str, dtype: Any = jnp.float32) -> jax.Array:
    """Summed in fp32 and rounded once, to `dtype`."""
    # On a GPU the default for fp32 operands is tf32.
    asked = lax.Precision.HIGHEST if precision == "ieee" else lax.Precision.DEFAULT
    return jnp.einsum(equation, left, right, precision=asked, preferred_element_type=jnp.float32).astype(dtype)


def l2norm(tensor: jax.Array) -> jax.Array:
    x, kept = tensor.astype(jnp.float32), jnp.finfo(tensor.dtype)
    x = x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPS)
    # XLA may leave out a conversion there and back; this it may not.
    return lax.reduce_precision(x, kept.nexp, kept.nmant).astype(tensor.dtype)


@dataclass(frozen=True)
class Gate:
    """A gate cumulated within its chunk, or none."""

    g: jax.Array | None
    """[NC,B,H_v,L]; where there is no token, that of the last before it."""
    base: str = "e"

    def exp(self, difference: jax.Array) -> jax.Array:
        return jnp.exp2(difference * LOG2E) if self.base == "e" else jnp.exp2(difference)

    def since_start(self) -> jax.Array | None:
        """[NC,B,H_v,L]: the decay of what came into the chunk."""
        return None if self.g is None else self.exp(self.g)

    def until_end(self) -> jax.Array | None:
        """[NC,B,H_v,L]: the decay of each token to the chunk's end."""
        return None if self.g is None else self.exp(self.g[..., -1:] - self.g)

    def total(self) -> jax.Array | None:
        """[NC,B,H_v]: the decay of the whole chunk."""
        return None if self.g is None else self.exp(self.g[..., -1])

    def weigh(self, products: jax.Array, pairs: jax.Array) -> jax.Array:
        """products[i,j] by the decay from j to i where `pairs` has them, else zero."""
        if self.g is not None:
            # Before the exp: gates may be of either sign, and what is left out must not overflow.
            difference = jnp.where(pairs, self.g[..., :, None] - self.g[..., None, :], 0.0)
            products = products * self.exp(difference)
        return jnp.where(pairs, products, 0.0)


def cumulate(g: jax.Array) -> jax.Array:
    """[NC,B,H_v,L] summed up from each chunk's first token, in fp32."""
    return lax.cumsum(g.astype(jnp.float32), axis=3)


def gate_of(chunks: Chunks, g: jax.Array | None, base: str = "e") -> Gate:
    """From a cumulated [B,T,H_v]."""
    if g is None:
        return Gate(None, base)
    g = chunks.split(g)
    if chunks.there is not None:
        there = chunks.there[:, None, None]
        last = jnp.sum(there, axis=-1, keepdims=True) - 1
        total = jnp.sum(jnp.where(jnp.arange(chunks.L) == last, g, 0.0), axis=-1, keepdims=True)
        g = jnp.where(there, g, total)
    return Gate(g, base)


def kkt(k: jax.Array, beta: jax.Array, gate: Gate, precision: str) -> jax.Array:
    """[NC,B,H_v,L,L]: strictly lower beta_i·(k_i·k_j)·exp(g_i - g_j)."""

    def compute(k: jax.Array, beta: jax.Array, g: jax.Array | None) -> jax.Array:
        L = k.shape[3]
        products = per_value_head(product("nbhid,nbhjd->nbhij", k, k, precision), beta.shape[2])
        return Gate(g, gate.base).weigh(products * beta[..., None], jnp.tri(L, k=-1, dtype=bool))

    # Nothing of [L,L] a head is kept for the backward pass.
    return jax.checkpoint(compute)(k, beta.astype(jnp.float32), gate.g)


def w_and_u(
    k: jax.Array, v: jax.Array, beta: jax.Array, inverse: jax.Array, gate: Gate, precision: str
) -> tuple[jax.Array, jax.Array]:
    """([NC,B,H_v,L,K], [NC,B,H_v,L,V])"""

    def compute(k: jax.Array, v: jax.Array, beta: jax.Array, inverse: jax.Array, g: jax.Array | None):
        decay = Gate(g, gate.base).since_start()
        weight = beta if decay is None else beta * decay
        scaled_k = (per_value_head(k, v.shape[2]).astype(jnp.float32) * weight[..., None]).astype(k.dtype)
        scaled_v = (v.astype(jnp.float32) * beta[..., None]).astype(v.dtype)
        inverse = inverse.astype(k.dtype)
        w = product("nbhij,nbhjd->nbhid", inverse, scaled_k, precision, k.dtype)
        return w, product("nbhij,nbhjd->nbhid", inverse, scaled_v, precision, k.dtype)

    return jax.checkpoint(compute)(k, v, beta.astype(jnp.float32), inverse, gate.g)


def pass_on(
    k: jax.Array,
    w: jax.Array,
    u: jax.Array,
    gate: Gate,
    initial_state: jax.Array | None,
    chunks: Chunks,
    N_seq: int,
    precision: str,
    final: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(the state before each chunk [NC,B,H_v,K,V], v_new [NC,B,H_v,L,V], the last states [N_seq,H_v,K,V] in fp32)."""
    _, batch, H_v, _, K = w.shape
    V, dtype, packing = u.shape[4], k.dtype, chunks.packing
    initial = None if initial_state is None else initial_state.astype(jnp.float32)
    state = jnp.zeros((batch, H_v, K, V), jnp.float32) if initial is None or packing is not None else initial
    # Packed, one state goes through all slots, and every sequence's comes from a pool and goes to another.
    source = initial if packing is not None else None
    target = jnp.zeros((N_seq, H_v, K, V), jnp.float32) if packing is not None and final else None
    # Repeated here and not in the loop, where it would be a launch for every chunk.
    steps: dict[str, Any] = {"k": per_value_head(k, H_v), "w": w, "u": u}
    if gate.g is not None:
        steps |= {"until_end": gate.until_end(), "total": gate.total()}
    if chunks.there is not None:
        steps["there"] = chunks.there
    if packing is not None:
        steps |= {name: getattr(packing, name) for name in ("sequence", "first", "last", "exists")}

    def through(state, now):
        before = state.astype(dtype)
        fresh = now["u"].astype(jnp.float32) - product("bhid,bhdv->bhiv", now["w"], before, precision)
        if chunks.there is not None:
            # No token, no value, though the state it met were infinite.
            fresh = jnp.where(now["there"][:, None], fresh, 0.0)
        after, left = state, fresh
        if gate.g is not None:
            after, left = state * now["total"][..., None, None], fresh * now["until_end"][..., None]
        after = after + product("bhid,bhiv->bhdv", now["k"], left.astype(dtype), precision)
        return after if packing is None else jnp.where(now["exists"], after, state), before, fresh.astype(u.dtype)

    # Of a chunk the state before it alone is kept for the backward pass.
    through = jax.checkpoint(through, prevent_cse=False)

    def step(carry, now):
        state, source, target = carry
        if source is not None:
            source, state = take_from_pool(source, state, now["sequence"], now["first"])
        elif packing is not None:
            # By a select: what an earlier sequence left may be NaN.
            state = jnp.where(now["first"], 0.0, state)
        state, before, v_new = through(state, now)
        if target is not None:
            target = put_in_pool(target, state, now["sequence"], now["last"])
        return (state, source, target), (before, v_new)

    carry = vary_alike((state, source, target), steps)
    (state, _, target), (before, v_new) = lax.scan(step, carry, steps, unroll=_UNROLL)
    return before, v_new, (state if packing is None else target) if final else None


def outputs(
    q: jax.Array, k: jax.Array, v: jax.Array, h: jax.Array, gate: Gate, scale: float, precision: str
) -> jax.Array:
    """[NC,B,H_v,L,V] in v's dtype, from v_new and the state before each chunk."""

    def compute(q: jax.Array, k: jax.Array, v: jax.Array, h: jax.Array, g: jax.Array | None) -> jax.Array:
        now, (L, H_v) = Gate(g, gate.base), (k.shape[3], v.shape[2])
        products = per_value_head(product("nbhid,nbhjd->nbhij", q, k, precision), H_v)
        products = now.weigh(products, jnp.tri(L, dtype=bool)).astype(v.dtype)
        o = product("nbhid,nbhdv->nbhiv", per_value_head(q, H_v), h.astype(q.dtype), precision)
        decay = now.since_start()
        o = o if decay is None else o * decay[..., None]
        return ((o + product("nbhij,nbhjv->nbhiv", products, v, precision)) * scale).astype(v.dtype)

    return jax.checkpoint(compute)(q, k, v, h, gate.g)
