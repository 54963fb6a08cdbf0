"""The five stages on a row of chunks, in plain JAX.

Chunked arrays are [S,L,…] as `Chunks.split` gives them; those of heads alone [S,H,L]. Products take their operands in the
inputs' dtype and sum in fp32. Their order and that of their results' axes is such that nothing but tokens and heads has to
change places on the way: headdim and dstate stay where memory is contiguous.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from .._numerics import exp, softplus
from ._xla_chunks import Chunks, Slots, take

# Elements [L,L] of all heads of as many chunks as are worked on at once: 256 MB in 16 bits.
_BLOCK = 1 << 27
# Chunks at once where the recurrence is written out, chunk by chunk, which takes a compiler time.
_MAX_CHUNKS = 128
# Chunks whose states one kernel computes. It begins anew with the first for each, but the next one waits for it.
_TOGETHER = 16


def chunks_at_once(H: int, L: int, most: int = _MAX_CHUNKS) -> int:
    return min(max(1, _BLOCK // (max(H, 1) * L * L)), most)


def over_blocks(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, chunked: Any, most: int) -> tuple[Any, Any]:
    """`lax.scan` of `body` over blocks of about `most` of the S chunks; (carry, what it returned for all S).

    The body is computed once more for the backward pass, which so keeps nothing but what goes in. What stands in for chunks
    where S is no multiple is zeros (False).
    """
    S = jax.tree.leaves(chunked)[0].shape[0]
    # A block a little larger costs less than a loop.
    blocks = -(-4 * S // (5 * most))
    body = jax.checkpoint(body)
    if blocks <= 1:
        return body(carry, chunked)
    size = -(-S // blocks)

    def block(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, blocks * size - S), *[(0, 0)] * (array.ndim - 1)))
        return padded.reshape(blocks, size, *array.shape[1:])

    def step(carry: Any, chunked: Any) -> tuple[Any, Any]:
        carry, results = body(carry, jax.tree.map(_as_it_lies, chunked))
        return carry, jax.tree.map(_as_it_lies, results)

    carry, results = lax.scan(step, carry, jax.tree.map(block, chunked))
    return carry, jax.tree.map(lambda array: array.reshape(blocks * size, *array.shape[2:])[:S], results)


def _as_it_lies(array: jax.Array) -> jax.Array:
    """Keeps XLA from bringing all of a loop's inputs into an order that only its body would like, and the results back."""
    return with_layout_constraint(array, Layout(major_to_minor=tuple(range(array.ndim))))


def cumulate(
    dt: jax.Array,
    A: jax.Array,
    dt_bias: jax.Array | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunks: Chunks,
) -> tuple[jax.Array, jax.Array]:
    """(cumulated dt·A, dt after its limits), [S,H,L], from [S,L,H]."""
    step = dt.astype(jnp.float32)
    if dt_bias is not None:
        step = step + dt_bias.astype(jnp.float32)
    if dt_softplus:
        step = softplus(step)
    # Not jnp.clip, which halves the gradient of a step that is at a limit.
    low, high = dt_limit
    step = jnp.where(step < low, low, jnp.where(step > high, high, step))
    step = chunks.where_there(step.transpose(0, 2, 1))
    return lax.cumsum(step * A.astype(jnp.float32)[:, None], axis=2), step


def leave(x: jax.Array, B: jax.Array, dt: jax.Array, a: jax.Array, precision: str) -> jax.Array:
    """[S,H,P,N]: what each chunk leaves of a zero state."""
    S, L, H, P = x.shape
    G, N = B.shape[2:]
    weight = (_decay(a[..., -1:], a) * dt).transpose(0, 2, 1)
    weighted = (x.astype(jnp.float32) * weight[..., None]).astype(x.dtype)
    # All heads of a group at once.
    weighted = weighted.reshape(S, L, G, H // G * P).transpose(0, 2, 1, 3)
    return _product(weighted, B.transpose(0, 2, 1, 3), 2, 2, precision).reshape(S, H, P, N)


def products(C: jax.Array, B: jax.Array, precision: str) -> jax.Array:
    """[S,G,L,L]"""
    return _product(C.transpose(0, 2, 1, 3), B.transpose(0, 2, 1, 3), 3, 3, precision)


def scan(
    CB: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    C: jax.Array,
    before: list[jax.Array],
    precision: str,
) -> jax.Array:
    """[S,L,H,P] in fp32, from the products within a chunk and the states before it, which come in parts."""
    S, L, H, P = x.shape
    G, N = C.shape[2:]
    weight = (_decay(a[..., :, None], a[..., None, :]) * dt[..., None, :]).reshape(S, G, H // G, L, L)
    weight = jnp.where(jnp.tril(jnp.ones((L, L), bool)), CB[:, :, None] * weight, 0.0).astype(x.dtype)
    y = _product(weight.reshape(S, H, L, L), x.transpose(0, 2, 1, 3), 3, 2, precision).transpose(0, 2, 1, 3)
    rows, carried, at = C.transpose(0, 2, 1, 3), [], 0
    for states in before:
        size = states.shape[0]
        states = states.astype(C.dtype).reshape(size, G, H // G * P, N)
        part = _product(rows[at : at + size], states, 3, 3, precision)
        carried.append(part.transpose(0, 2, 1, 3).reshape(size, L, H, P))
        at += size
    return y + jnp.concatenate(carried) * exp(a).transpose(0, 2, 1)[..., None]


class Passed(NamedTuple):
    state: jax.Array
    """[H,P,N] in fp32: after the last slot."""
    before: list[jax.Array]
    """[…,H,P,N] each: the states before all slots, in parts."""
    after: jax.Array | None
    """[S,H,P,N] in fp32: the states after them, if asked for."""


def pass_on(
    states: jax.Array,
    total: jax.Array,
    state: jax.Array,
    slots: Slots | None,
    initial_states: jax.Array | None,
    dtype: Any,
    *,
    after: bool = False,
    guard: bool = False,
) -> Passed:
    """One chunk after the other, in fp32. `total` [S,H]: the logarithm of a chunk's whole decay. `dtype`: of `before`.

    `slots`: None where no other sequence than the one of `state` begins. `guard`: states and total may be anything in slots
    without a chunk, not only zero.
    """
    S = states.shape[0]
    # Split, not indexed: of that the backward pass makes one array, and not the sum of as many as there are chunks.
    left, decay = lax.split(states, [1] * S), lax.split(exp(total)[..., None, None], [1] * S)
    fresh: Any = [0.0] * S
    if slots is not None and initial_states is not None:
        wanted = jnp.where(slots.first, slots.sequence, initial_states.shape[0] + jnp.arange(S, dtype=jnp.int32))
        fresh = lax.split(take(initial_states, wanted).astype(jnp.float32), [1] * S)
    before_parts, after_parts = [], []
    state = state[None]
    for begin in range(0, S, _TOGETHER):
        # Or this part's kernel would go back to the first chunk of all.
        state = lax.optimization_barrier(state)
        befores, afters = [], []
        for s in range(begin, min(begin + _TOGETHER, S)):
            if slots is not None:
                # By select: what an earlier sequence left may be NaN.
                state = jnp.where(slots.first[s], fresh[s], state)
            befores.append(state.astype(dtype))
            following = state * decay[s] + left[s]
            state = jnp.where(slots.exists[s], following, state) if guard and slots is not None else following
            afters.append(state)
        before_parts.append(jnp.concatenate(befores))
        if after:
            after_parts.append(jnp.concatenate(afters))
    return Passed(state[0], before_parts, jnp.concatenate(after_parts) if after else None)


def _decay(later: jax.Array, earlier: jax.Array) -> jax.Array:
    """exp(min(later - earlier, 0)), whose gradient is whole also where a step of 0 makes both equal."""
    difference = later - earlier
    return exp(jnp.where(difference > 0, 0.0, difference))


def _product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int, precision: str) -> jax.Array:
    """Sums over an axis of each, for each of their first two; the left one's other axis comes first."""
    # On a GPU the default for fp32 operands is tf32.
    asked = lax.Precision.HIGHEST if precision == "ieee" else lax.Precision.DEFAULT
    dims = (((left_axis,), (right_axis,)), ((0, 1), (0, 1)))
    return lax.dot_general(left, right, dims, precision=asked, preferred_element_type=jnp.float32)
