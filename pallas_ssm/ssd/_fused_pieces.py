"""How the fused path cuts sequences: into chunks of 64 tokens, and pieces of many chunks that run in parallel.

A sequence's chunks and pieces begin at its own first token. Packed, sequence n's piece k has slot
cu_seqlens[n] // tokens + n + k (`tokens`: of a piece), and so has what is past the last sequence, as one more sequence: enough
slots whatever the lengths are, known without looking at them, and found by a search. A slot in which nothing stands does
nothing.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._combined_call import Static

CHUNK = 64


class Piece(NamedTuple):
    """The tokens of one piece of a sequence."""

    b: jax.Array
    """Batch row."""
    n: jax.Array
    """Its sequence; N_seq: what belongs to nobody."""
    k: jax.Array
    """Which piece of it."""
    begin: jax.Array
    """The first token, in its batch row."""
    length: jax.Array
    """Tokens: 0 for the only piece of an empty sequence, and less where there is no piece."""
    row: jax.Array
    """The first token's row in x, B and C."""
    last: jax.Array
    """Whether the sequence ends with it."""
    slot: jax.Array
    """Among all batch rows' pieces."""
    base: jax.Array
    """The slot of the sequence's first chunk among the caller's chunks."""

    @property
    def chunks(self) -> jax.Array:
        return lax.div(self.length + (CHUNK - 1), jnp.int32(CHUNK))


@dataclass(frozen=True)
class Cut:
    tokens: int
    """Tokens of a piece."""
    slots: int
    """Pieces of a batch row; packed, slots for those of all sequences."""
    several: bool
    """Whether a sequence may have more than one."""
    shares: int = 1
    """Thread blocks that compute the end state of a piece; every one has chunks of it."""

    @property
    def share_tokens(self) -> int:
        """Of a share; a piece's last may have fewer."""
        return -(-self.tokens // (CHUNK * self.shares)) * CHUNK


def cut(static: Static, chunks_per_piece: int, shares: int = 1) -> Cut:
    whole = _cut(static, chunks_per_piece)
    if not whole.several:
        return whole
    wanted = replace(whole, shares=shares)
    return replace(whole, shares=-(-whole.tokens // wanted.share_tokens))


def _cut(static: Static, chunks_per_piece: int) -> Cut:
    dims = static.dims
    if not dims.packed:
        chunks = -(-dims.T // CHUNK)
        piece = min(chunks_per_piece, chunks)
        return Cut(piece * CHUNK, -(-chunks // piece), piece < chunks)
    # A piece longer than everything: each sequence has one, in slot n.
    tokens = min(chunks_per_piece, dims.T // CHUNK + 1) * CHUNK
    return Cut(tokens, dims.T // tokens + dims.N_seq + 1, tokens < dims.T)


def share(cut: Cut, piece: Piece, i: jax.Array) -> Piece:
    """Share i of a whole piece."""
    past = i * cut.share_tokens
    return piece._replace(
        begin=piece.begin + past,
        length=jnp.clip(piece.length - past, 0, cut.share_tokens),
        row=piece.row + past,
        slot=piece.slot * cut.shares + i,
    )


def locate(static: Static, cut: Cut, cu_seqlens: Any, b: jax.Array, slot: jax.Array) -> Piece:
    """The piece in a slot of batch row b."""
    dims, unit = static.dims, jnp.int32(cut.tokens)
    if not dims.packed:
        begin = slot * unit
        length = jnp.minimum(dims.T - begin, unit)
        return Piece(b, b, slot, begin, length, begin, slot == cut.slots - 1, b * cut.slots + slot, jnp.int32(0))

    def bound(n: jax.Array) -> jax.Array:
        # Bounds are data: whatever they hold, no token outside [0, T) is touched.
        return jnp.where(n == 0, 0, jnp.clip(cu_seqlens[n].astype(jnp.int32), 0, dims.T))

    def first_slot(n: jax.Array) -> jax.Array:
        return lax.div(bound(n), unit) + n

    # The last sequence whose first slot is not past this one: three bits at a time, because a thread block begins by waiting
    # for these loads, one after another in a binary search.
    n = jnp.int32(0)
    for step in (8**i for i in reversed(range(-(-dims.N_seq.bit_length() // 3)))):
        found = jnp.int32(0)
        for there in (n + i * step for i in range(1, 8) if i * step <= dims.N_seq):
            inside = (there <= dims.N_seq) & (first_slot(jnp.minimum(there, dims.N_seq)) <= slot)
            found = found + jnp.where(inside, 1, 0)
        n = n + found * step
    first = bound(n)
    end = jnp.where(n == dims.N_seq, dims.T, bound(jnp.minimum(n + 1, dims.N_seq)))
    k = slot - first_slot(n)
    begin = first + k * unit
    base = lax.div(first, jnp.int32(dims.L)) + n
    row = base * dims.L + k * unit if static.chunk_aligned else begin
    # An empty sequence has one piece all the same, for its last state.
    length = jnp.where((k == 0) | (begin < end), jnp.clip(end - begin, 0, unit), -1)
    return Piece(b, n, k, begin, length, row, begin + unit >= end, slot, base)
