"""Sizes of the fused path, and where its tiles lie.

Between the two kernels everything is in tiles of 64 tokens (a chunk) by 64 columns, one after another in memory: sequence n's
chunk c has slot cu_seqlens[n] // 64 + n + c of its batch row (`ssm_configs.contracts.gdn`), and what stands in a tile's rows
past a sequence's end is zero.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..ssd._tiles import COLUMNS, last_sequence
from ._call import Static

CHUNK = 64
# Rows of a chunk's weights: what a query and what a key takes of the state before the chunk, and what the chunk leaves of it.
QUERY, KEY, LEFT = range(3)


@dataclass(frozen=True)
class Shape:
    """Sizes that are known when a kernel is traced."""

    static: Static
    dtype: Any
    """Of q, k and v."""
    heads: int
    """Value heads of one block that prepares."""
    stages: int
    """Chunks in shared memory of a block that carries a state."""
    segment: int
    """Chunks of a sequence's segments; `NC` where sequences stay whole."""

    @property
    def widths(self) -> int:
        """Tiles of a row of q, k and Y."""
        return self.static.dims.K // COLUMNS

    @property
    def parts(self) -> int:
        """Tiles of a row of v."""
        return self.static.dims.V // COLUMNS

    @property
    def chunks(self) -> int:
        return self.static.dims.B * self.static.dims.NC

    @property
    def pieces(self) -> int:
        """Of the work that prepares."""
        return self.chunks * (self.static.dims.H_v // self.heads)

    @property
    def cut(self) -> bool:
        """Whether sequences are in segments."""
        return self.segment < self.static.dims.NC

    @property
    def segments(self) -> int:
        """Of all sequences. A packed one's first segment stands at its first slot // `segment` + its number, and where there
        are fewer than that leaves room for, those behind its last are empty."""
        dims = self.static.dims
        if not self.cut:
            return dims.N_seq
        return dims.NC // self.segment + dims.N_seq if dims.packed else dims.B * self.row_segments

    @property
    def row_segments(self) -> int:
        """Of a dense row."""
        return -(-self.static.dims.NC // self.segment)

    @property
    def loop_blocks(self) -> int:
        return (self.segments + self.static.dims.packed) * self.static.dims.H_v * self.parts

    @property
    def may_end_short(self) -> bool:
        """Whether a chunk may have fewer than 64 tokens."""
        return self.static.dims.packed or self.static.dims.T % CHUNK != 0

    @property
    def counts(self) -> dict[str, int]:
        """Tiles of a chunk, by what they are of: one array after the other in memory."""
        dims = self.static.dims
        return {"Y": dims.H_v * self.widths, "PX": dims.H_v}

    @property
    def tiles(self) -> jax.ShapeDtypeStruct:
        """All of them, as one array: every array takes TMA descriptors of its own, which are slow to compile."""
        return jax.ShapeDtypeStruct((self.chunks * sum(self.counts.values()), CHUNK, COLUMNS), self.dtype)

    def first(self, name: str) -> int:
        """The first tile of Y or PX."""
        names = list(self.counts)
        return self.chunks * sum(self.counts[other] for other in names[: names.index(name)])

    def first_segment(self, begin: jax.Array, n: jax.Array) -> jax.Array:
        """Of packed sequence n, which begins with token `begin`."""
        return lax.div(_first_slot(begin, n), jnp.int32(self.segment)) + n

    def locate(self, cu_seqlens: Any, n: jax.Array) -> "Segment":
        """Of all segments the n-th. One behind the last of packed ones: what is no sequence's."""
        dims = self.static.dims
        if not dims.packed:
            b, chunk = lax.div(n, jnp.int32(self.row_segments)), lax.rem(n, jnp.int32(self.row_segments)) * self.segment
            return self._segment(b, jnp.int32(0), jnp.int32(dims.T), b * dims.NC, chunk)

        def bound(n: jax.Array) -> jax.Array:
            # Bounds are data: whatever they hold, no token outside [0, T) is touched.
            return jnp.where(n == 0, 0, jnp.clip(cu_seqlens[n].astype(jnp.int32), 0, dims.T))

        sequence, chunk = jnp.minimum(n, dims.N_seq), jnp.int32(0)
        if self.cut:

            def first(n: jax.Array) -> jax.Array:
                return self.first_segment(bound(n), n)

            low = last_sequence(first, n, dims.N_seq)
            sequence = jnp.where(n == self.segments, dims.N_seq, low)
            chunk = jnp.where(n == self.segments, 0, jnp.maximum(n - first(low), 0) * self.segment)
        end = jnp.where(sequence == dims.N_seq, dims.T, bound(jnp.minimum(sequence + 1, dims.N_seq)))
        rest = sequence == dims.N_seq
        return self._segment(jnp.int32(0), bound(sequence), end, _first_slot(bound(sequence), sequence), chunk, rest)

    def _segment(
        self, b: Any, begin: jax.Array, end: jax.Array, slot: jax.Array, chunk: jax.Array, rest: Any = False
    ) -> "Segment":
        """From `chunk` on of the sequence [begin, end), whose first slot is `slot`."""
        length = jnp.maximum(end - begin - chunk * CHUNK, 0)
        whole = jnp.where(rest, length, self.segment * CHUNK) if self.cut else length
        return Segment(b, begin + chunk * CHUNK, jnp.minimum(length, whole), slot + chunk, length <= whole)


def _first_slot(begin: jax.Array, n: jax.Array) -> jax.Array:
    return lax.div(begin, jnp.int32(CHUNK)) + n


@dataclass(frozen=True)
class Segment:
    b: Any
    """Its batch row."""
    begin: jax.Array
    """The first token."""
    length: jax.Array
    slot: jax.Array
    """Of the first chunk, among all rows'."""
    last: jax.Array
    """Whether no other of its sequence follows."""
