"""Tokens as chunks and back, in plain JAX: all batch rows' or sequences' chunks in one row of slots, in their order.

Whatever a place without a token would hold is replaced by a select, never by a product with zero, so that NaN in other
sequences and in padding stays there. All indices are in closed form, and out of range where there is nothing to read; none
occurs twice, so that the backward pass of a gather needs no atomics.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Slots(NamedTuple):
    """Of each slot, [S]."""

    sequence: jax.Array
    """The sequence that has it. Each has at least one."""
    first: jax.Array
    """Whether it is that sequence's first."""
    exists: jax.Array
    """Whether a chunk stands in it."""
    outer: jax.Array
    """The caller's slot that it is part of."""
    ends: jax.Array
    """Whether it is the last chunk of those in that slot."""


@dataclass(frozen=True)
class Packing:
    """Where the tokens of packed sequences are."""

    token: jax.Array
    """[S,L]: the token at each place of a slot."""
    row: jax.Array
    """[S,L]: its row in chunk-aligned rows."""
    place: jax.Array
    """[T]: where among the S·L places each token is."""


@dataclass(frozen=True)
class Chunks:
    """B rows of T tokens in S slots of L."""

    B: int
    T: int
    L: int
    S: int
    there: jax.Array | None
    """[S,L]: whether there is a token; None where there is one everywhere."""
    slots: Slots
    last: jax.Array
    """[N_seq]: the last slot of each sequence, with or without a chunk."""
    packing: Packing | None

    def split(self, tensor: jax.Array) -> jax.Array:
        """[S,L,...] from [B,T,...]; zero where there is no token."""
        return self._rows(tensor) if self.packing is None else take(tensor[0], self.packing.token)

    def split_aligned(self, tensor: jax.Array, chunk_size: int) -> jax.Array:
        """The same from rows in which every sequence begins at a whole chunk of `chunk_size`."""
        if self.packing is None or chunk_size % self.L == 0:
            return self._rows(tensor)
        return take(tensor[0], self.packing.row)

    def join(self, chunks: jax.Array) -> jax.Array:
        """[B,T,...] from [S,L,...]; zero for tokens that no sequence has."""
        if self.packing is None:
            return chunks.reshape(self.B, self.S // self.B * self.L, *chunks.shape[2:])[:, : self.T]
        return take(chunks.reshape(self.S * self.L, *chunks.shape[2:]), self.packing.place)[None]

    def where_there(self, tensor: jax.Array) -> jax.Array:
        """[S,...,L] with zeros where there is no token."""
        if self.there is None:
            return tensor
        return jnp.where(self.there.reshape(self.S, *[1] * (tensor.ndim - 2), self.L), tensor, 0)

    def _rows(self, tensor: jax.Array) -> jax.Array:
        rows = self.S // self.B * self.L
        tensor = tensor[:, :rows]
        tensor = jnp.pad(tensor, ((0, 0), (0, rows - tensor.shape[1]), *[(0, 0)] * (tensor.ndim - 2)))
        chunks = tensor.reshape(self.S, self.L, *tensor.shape[2:])
        if self.there is None:
            return chunks
        return jnp.where(self.there.reshape(self.S, self.L, *[1] * (tensor.ndim - 2)), chunks, 0)


def dense(B: int, T: int, L: int, outer: int | None = None) -> Chunks:
    """Chunks of L tokens, each row's from its first token on. `outer`: the caller's chunk size."""
    outer = outer or L
    NC = -(-T // L)
    row, chunk = np.divmod(np.arange(B * NC, dtype=np.int32), np.int32(NC))
    last = chunk == NC - 1
    slots = Slots(
        sequence=jnp.asarray(row),
        first=jnp.asarray(chunk == 0),
        exists=jnp.ones(B * NC, bool),
        outer=jnp.asarray(row * np.int32(-(-T // outer)) + chunk * L // outer),
        ends=jnp.asarray(last | ((chunk + 1) * L % outer == 0)),
    )
    there = None if T == NC * L else jnp.asarray(chunk[:, None] * L + np.arange(L) < T)
    return Chunks(B, T, L, B * NC, there, slots, jnp.asarray(np.flatnonzero(last).astype(np.int32)), None)


def packed(
    T: int, L: int, N_seq: int, cu_seqlens: jax.Array, *, outer: int | None = None, aligned: bool = False
) -> Chunks:
    """Chunks of L tokens, each sequence's from its first token on. `aligned`: slots follow rows aligned to `outer`."""
    outer = outer or L
    unit = outer if aligned and outer % L == 0 else L
    S = (T // unit + N_seq) * (unit // L)
    bounds = jnp.clip(cu_seqlens, 0, T).at[0].set(0)
    begin, length = bounds[:-1], jnp.maximum(bounds[1:] - bounds[:-1], 0)
    number = jnp.arange(N_seq, dtype=jnp.int32)
    start = (begin // unit + number) * (unit // L)
    first_row = (begin // outer + number) * outer

    slot, own = jnp.arange(S, dtype=jnp.int32), jnp.arange(L, dtype=jnp.int32)
    # The search unrolled, because a loop costs a GPU some launches a step.
    sequence = jnp.searchsorted(start, slot, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    # In order, whatever the bounds are.
    sequence = jnp.clip(sequence, 0, N_seq - 1)
    chunk = slot - start[sequence]
    offset = chunk[:, None] * L + own
    there = (offset >= 0) & (offset < length[sequence][:, None])
    nowhere = slot[:, None] * L + own
    exists = there[:, 0]
    slots = Slots(
        sequence=sequence,
        first=chunk == 0,
        exists=exists,
        outer=first_row[sequence] // outer + chunk * L // outer,
        ends=exists & (((chunk + 1) * L >= length[sequence]) | ((chunk + 1) * L % outer == 0)),
    )
    token = jnp.arange(T, dtype=jnp.int32)
    owner = jnp.searchsorted(begin + length, token, side="right", method="scan_unrolled").astype(jnp.int32)
    owner = jnp.clip(owner, 0, N_seq - 1)
    at = token - begin[owner]
    inside = (at >= 0) & (at < length[owner])
    packing = Packing(
        token=jnp.where(there, begin[sequence][:, None] + offset, T + nowhere),
        row=jnp.where(there, first_row[sequence][:, None] + offset, (T // outer + N_seq) * outer + nowhere),
        place=jnp.where(inside, start[owner] * L + at, S * L + token),
    )
    last = jnp.concatenate([start[1:], jnp.full(1, S, jnp.int32)]) - 1
    return Chunks(1, T, L, S, there, slots, last, packing)


def take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Zeros for what is out of range."""
    return rows.at[index].get(mode="fill", fill_value=0, unique_indices=True)
