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

from ..ssd._tiles import COLUMNS
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
    """Chunks of a dense sequence's segments."""

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
    def segments(self) -> int:
        """Of a batch row."""
        return 1 if self.static.dims.packed else -(-self.static.dims.NC // self.segment)

    @property
    def loop_blocks(self) -> int:
        dims = self.static.dims
        return (dims.N_seq * self.segments + dims.packed) * dims.H_v * self.parts

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

    def sequence(self, cu_seqlens: Any, n: jax.Array, segments: int) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        """(batch row, first token, end, first slot among all rows') of sequence n, packed, where N_seq is what is nobody's; or
        of the n-th segment, of which every row has `segments`."""
        dims = self.static.dims
        if not dims.packed:
            b, chunk = lax.div(n, jnp.int32(segments)), lax.rem(n, jnp.int32(segments)) * self.segment
            end = jnp.minimum((chunk + self.segment) * CHUNK, dims.T)
            return b, chunk * CHUNK, end, b * dims.NC + chunk

        def bound(n: jax.Array) -> jax.Array:
            # Bounds are data: whatever they hold, no token outside [0, T) is touched.
            return jnp.where(n == 0, 0, jnp.clip(cu_seqlens[n].astype(jnp.int32), 0, dims.T))

        begin = bound(n)
        end = jnp.where(n == dims.N_seq, dims.T, bound(jnp.minimum(n + 1, dims.N_seq)))
        return jnp.int32(0), begin, end, lax.div(begin, jnp.int32(CHUNK)) + n
