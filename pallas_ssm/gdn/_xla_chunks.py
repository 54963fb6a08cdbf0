"""Tokens as chunks and back, in plain JAX: [NC,B,H,L,…], sequence n's chunk c in the slot where the contract has it.

Heads before tokens, so that a product of all chunks' and heads' matrices is one batched product of what lies in memory; chunks
before everything, so that a loop over them takes one slice after the other, of all batch rows.

Whatever a place without a token would hold is replaced by a select, never by a product with zero, so that NaN in other
sequences and in padding stays there. All indices are in closed form, and out of range where there is nothing to read; none
occurs twice, so that the backward pass of a gather needs no atomics.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Packing:
    """Where packed sequences are, of T tokens in NC slots of L."""

    token: jax.Array
    """[NC,L]: the token at each place of a slot."""
    place: jax.Array
    """[T]: where among the NC·L places each token is."""
    sequence: jax.Array
    """[NC]: the sequence that has the slot. Each has at least one, in their order."""
    first: jax.Array
    """[NC]: whether it is that sequence's first."""
    last: jax.Array
    """[NC]: whether it is that sequence's last, with or without a chunk."""
    exists: jax.Array
    """[NC]: whether a chunk stands in it."""


@dataclass(frozen=True)
class Chunks:
    T: int
    L: int
    NC: int
    there: jax.Array | None
    """[NC,L]: whether there is a token; None where there is one everywhere."""
    packing: Packing | None

    def split(self, tensor: jax.Array) -> jax.Array:
        """[NC,B,H,L,…] from [B,T,H,…]; zero where there is no token."""
        B, _, *features = tensor.shape
        if self.packing is None:
            # Nothing has to be masked: what is past the last token does not exist.
            rows = jnp.pad(tensor, ((0, 0), (0, self.NC * self.L - self.T), *[(0, 0)] * len(features)))
        else:
            rows = _take(tensor, self.packing.token.reshape(-1))
        rows = rows.reshape(B, self.NC, self.L, *features)
        return jnp.transpose(rows, (1, 0, 3, 2, *range(4, rows.ndim)))

    def join(self, chunks: jax.Array) -> jax.Array:
        """[B,T,H,…] from [NC,B,H,L,…]; zero for tokens that no sequence has."""
        rows = jnp.transpose(chunks, (1, 0, 3, 2, *range(4, chunks.ndim)))
        rows = rows.reshape(rows.shape[0], self.NC * self.L, *rows.shape[3:])
        return rows[:, : self.T] if self.packing is None else _take(rows, self.packing.place)


def chunked(T: int, L: int, N_seq: int, cu_seqlens: jax.Array | None) -> Chunks:
    """T and N_seq are at least 1."""
    if cu_seqlens is None:
        NC = -(-T // L)
        there = None if T == NC * L else (jnp.arange(NC * L) < T).reshape(NC, L)
        return Chunks(T, L, NC, there, None)
    NC = T // L + N_seq
    bounds = jnp.clip(cu_seqlens, 0, T).at[0].set(0)
    begin, length = bounds[:-1], jnp.maximum(bounds[1:] - bounds[:-1], 0)
    start = begin // L + jnp.arange(N_seq, dtype=jnp.int32)

    slot, own = jnp.arange(NC, dtype=jnp.int32), jnp.arange(L, dtype=jnp.int32)
    # The search unrolled, because a loop costs a GPU some launches a step.
    sequence = jnp.searchsorted(start, slot, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    sequence = jnp.clip(sequence, 0, N_seq - 1)
    chunk = slot - start[sequence]
    offset = chunk[:, None] * L + own
    # Bounds that descend put a sequence's first slot behind one that is looked at.
    there = (offset >= 0) & (offset < length[sequence][:, None])

    token = jnp.arange(T, dtype=jnp.int32)
    owner = jnp.searchsorted(begin + length, token, side="right", method="scan_unrolled").astype(jnp.int32)
    owner = jnp.clip(owner, 0, N_seq - 1)
    at = token - begin[owner]
    packing = Packing(
        token=jnp.where(there, begin[sequence][:, None] + offset, T + slot[:, None] * L + own),
        place=jnp.where((at >= 0) & (at < length[owner]), start[owner] * L + at, NC * L + token),
        sequence=sequence,
        first=chunk == 0,
        last=jnp.append(sequence[1:], N_seq) != sequence,
        exists=there[:, 0],
    )
    return Chunks(T, L, NC, there, packing)


def _take(tensor: jax.Array, index: jax.Array) -> jax.Array:
    """Rows `index` of the one batch row; zeros for what is out of range."""
    (only,) = tensor
    return only.at[index].get(mode="fill", fill_value=0, unique_indices=True)[None]
