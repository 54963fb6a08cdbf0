"""The Mosaic GPU kernel of `fused_recurrent_gated_delta_rule`: tiles of whole columns of one head's state, in place.

The operator moves 2·K·V state elements a head and does next to nothing with them, so a block asks for its tiles of the state
first, and for the few hundred bytes of everything else while they are on their way. Columns stay in threads; both sums along K
are taken over the decayed state, before the update,

    o = scale·(S^T·q + fresh·(k·q))          fresh = beta·(v - S^T·k)

so that nothing waits for the first to begin the second, and a tile is looked at once. Slots, bounds and padding are
`selective_state_update`'s, whose blocks this one is a kind of.
"""

from functools import partial
from math import gcd
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._branches import when
from .._numerics import exp, softplus
from .._selective_state_update_kernel import _Block as StateBlock
from .._selective_state_update_tiles import DirectTiles, StagedTiles
from .._tiles import TileLayout
from ._recurrent_call import OP, Floats, Integers, Static
from ._recurrent_launch import Launch
from ._xla_stages import _EPS

_NAMES = tuple(name for name in (*Floats._fields, *Integers._fields) if name != "state")
# One vector of 16 bytes from each thread of a warpgroup, on its way from warp to warp.
_REDUCTION_BYTES = 128 * 16


def run(static: Static, launch: Launch, floats: Floats, integers: Integers) -> tuple[jax.Array, jax.Array]:
    """(o, new state)."""
    dims = static.dims
    arrays = floats._asdict() | integers._asdict()
    operands = {name: arrays[name] for name in _NAMES if arrays[name] is not None}
    state = jax.new_ref(floats.state)
    packed = integers.cu_seqlens is not None
    tiles = [
        plgpu.SMEM((launch.tiles_per_block, dims.K, launch.columns), floats.state.dtype),
        plgpu.Barrier(num_barriers=launch.tiles_per_block),
    ]
    kernel = plgpu.kernel(
        partial(_body, static, launch, tuple(operands), packed),
        out_type=jax.ShapeDtypeStruct(floats.v.shape, floats.v.dtype),
        scratch_types=[plgpu.SMEM((2, dims.K), jnp.float32), *(tiles if launch.use_tma else [])],
        # Packed, one more sequence than there are: its blocks zero the rows that belong to nobody.
        grid=((dims.N_seq + packed) * dims.H_v * (dims.V // launch.BLOCK_SIZE_V),),
        grid_names=("block",),
        kernel_name=OP,
        compiler_params=plgpu.CompilerParams(
            # Every element of a tile belongs to one thread, which reads it before it writes it. q and k have barriers of their
            # own, in `_Block.spread`.
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=_REDUCTION_BYTES,
        ),
    )
    o = kernel(*operands.values(), state)
    return o, state[...]


def _body(static: Static, launch: Launch, names: tuple[str, ...], packed: bool, *refs: Any) -> None:
    vectors, *scratch = refs[len(names) + 2 :]
    given = dict(zip((*names, "state", "o"), refs, strict=False))
    refs_by_name = SimpleNamespace(**{name: given.get(name) for name in (*_NAMES, "state", "o")})
    block = _Block(static, launch, refs_by_name, vectors, *(scratch or (None, None)))
    (block.packed if packed else block.one_token)()


class _Token(NamedTuple):
    """What a head needs of one token, in fp32; q and k along a tile's rows."""

    q: jax.Array
    k: jax.Array
    product: jax.Array
    """q·k."""
    decay: jax.Array
    beta: jax.Array


class _Block(StateBlock):
    """What one thread block does: its columns of one value head of one sequence. `at` below is a tile's first column."""

    def __init__(self, static: Static, launch: Launch, refs: Any, vectors: Any, tiles: Any, barriers: Any):
        dims = static.dims
        self.static: Any = static
        self.dims: Any = dims
        self.refs, self.vectors, self.tiles, self.barriers = refs, vectors, tiles, barriers
        self.columns = launch.columns
        self.launch = launch.tiles(dims.K)
        tile = launch.layout.tile
        self.row, self.column = tile.reduce(1), tile.reduce(0)
        # Every warp has all of q and k, so that their sums are shuffles alone.
        lanes = gcd(dims.K, 32)
        self.whole = TileLayout(gcd(dims.K // lanes, 4), lanes, 1, 1).tile.reduce(0)
        per_head = dims.V // launch.BLOCK_SIZE_V
        block = lax.axis_index("block")
        self.n = block // (dims.H_v * per_head)
        self.h = block // per_head % dims.H_v
        first = block % per_head * launch.BLOCK_SIZE_V
        self.at = [first + i * launch.columns for i in range(launch.tiles_per_block)]

    def update(self, t: jax.Array, source: jax.Array, target: jax.Array, always: bool) -> None:
        """Token t of a live sequence. `always`: the target is known to be a slot that keeps the state."""
        states = self.states(source, target, always)
        token, values = self.load_token(t)
        for i, at in enumerate(self.at):
            states.wait(i)
            s, o = self.step(states.read(i, 0).astype(jnp.float32), token, values[i])
            self.refs.o[t, self.h, self.within(at)] = o
            states.write(i, 0, s.astype(self.refs.state.dtype))
            states.send(i)
        states.drain()

    def tokens(self, begin: jax.Array, end: jax.Array, source: jax.Array, target: jax.Array) -> None:
        """A live sequence: its one tile stays in registers from its first token to its last."""
        refs, T_max, (at,) = self.refs, self.dims.T_max, self.at
        states = self.states(source, target, always=refs.target is None)
        states.wait(0)

        def one(t: jax.Array, s: jax.Array) -> jax.Array:
            token, (value,) = self.load_token(t)
            s, o = self.step(s, token, value)
            if refs.accepted is None:
                refs.o[t, self.h, self.within(at)] = o
                return s
            # Speculative decode keeps the state after every token that has a slot.
            place = t - begin
            to = (refs.source if refs.target is None else refs.target)[self.n, jnp.minimum(place, T_max - 1)]
            to = jnp.where(place < T_max, to, -1)
            good = jnp.broadcast_to(to < self.dims.S, o.shape)
            refs.o[t, self.h, self.within(at)] = jnp.where(good, o, jnp.full_like(o, jnp.nan))

            @when(self.keeps(to))
            def _():
                refs.state[to, self.h, :, self.within(at)] = s.astype(refs.state.dtype)

            return s

        s = lax.fori_loop(begin, end, one, states.read(0, 0).astype(jnp.float32))
        if refs.accepted is None:
            states.write(0, 0, s.astype(refs.state.dtype))
            states.send(0)
            states.drain()

    def step(self, s: Any, token: Any, value: Any, *_: Any) -> tuple[jax.Array, jax.Array]:
        """(state in fp32, o in its dtype) of one tile."""

        def over_columns(rows: jax.Array) -> jax.Array:
            return lax.broadcast_in_dim(rows, s.shape, (0,))

        s = s * token.decay
        k = over_columns(token.k)
        fresh = token.beta * (value - jnp.sum(s * k, axis=0))
        o = (jnp.sum(s * over_columns(token.q), axis=0) + fresh * token.product) * self.static.scale
        s = s + k * lax.broadcast_in_dim(fresh, s.shape, (1,))
        return s, o.astype(self.refs.o.dtype)

    def load_token(self, t: jax.Array) -> tuple[_Token, list[jax.Array]]:
        """(token t, its v for each tile)."""
        refs, h = self.refs, self.h
        values = [self.load(refs.v.at[t, h, self.within(at)], self.column) for at in self.at]
        g, beta = (ref[t, h].astype(jnp.float32) for ref in (refs.g, refs.beta))
        A_log, dt_bias = (None if ref is None else ref[h].astype(jnp.float32) for ref in (refs.A_log, refs.dt_bias))
        # The compiler would issue these loads, and those of the state, after the sums below, which wait for q and k. Across a
        # barrier it moves none.
        plgpu.commit_smem()
        h_k = lax.div(h, jnp.int32(self.dims.H_v // self.dims.H_k))
        q, k = (self.load(ref.at[t, h_k], self.whole) for ref in (refs.q, refs.k))
        if A_log is not None:
            g = -exp(A_log) * softplus(g if dt_bias is None else g + dt_bias)
        if self.static.sigmoid_beta:
            beta = 1.0 / (1.0 + exp(-beta))
        if self.static.use_qk_l2norm:
            q, k = (_unit(x, refs.q.dtype) for x in (q, k))
        product = jnp.sum(q * k)
        return _Token(*self.spread(q, k), product, exp(g), beta), values

    def spread(self, *vectors: jax.Array) -> list[jax.Array]:
        """Vectors over K from every warp to the rows of a tile."""
        # The last token's have been read: barriers stand between, those of its sums over K.
        for i, vector in enumerate(vectors):
            self.vectors[i] = vector
        plgpu.commit_smem()
        return [self.load(self.vectors.at[i], self.row) for i in range(len(vectors))]

    def within(self, at: jax.Array) -> Any:
        return pl.ds(at, self.columns)

    # Stores.

    def states(self, source: jax.Array, target: jax.Array, always: bool) -> StagedTiles | DirectTiles:
        """This block's tiles of the state, on their way from `source`."""
        state = self.refs.state
        read, write = ([state.at[slot, self.h, :, self.within(at)] for at in self.at] for slot in (source, target))
        keep = None if always else self.keeps(target)
        if self.launch.use_tma:
            return StagedTiles(self.launch, read, write, keep, self.tiles, self.barriers)
        return DirectTiles(self.launch, read, write, keep)

    def fill(self, t: jax.Array, value: jax.Array) -> None:
        """This block's columns of o of token t."""
        filled = lax.broadcast_in_dim(value.astype(self.refs.o.dtype), (self.columns,), ())
        filled = plgpu.layout_cast(filled, self.column)
        for at in self.at:
            self.refs.o[t, self.h, self.within(at)] = filled


def _unit(x: jax.Array, dtype: Any) -> jax.Array:
    """x of length 1, rounded to its dtype, as the twin and the XLA form have it."""
    return (x * lax.rsqrt(jnp.sum(x * x) + _EPS)).astype(dtype).astype(jnp.float32)
