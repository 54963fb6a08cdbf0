"""The Mosaic GPU kernel of `selective_state_update`: tiles of BLOCK_SIZE_M rows of headdim by the whole dstate, in place.

The operator moves 2·P·N state elements a head and does next to nothing with them. So a block asks for all its tiles of
the state first (TMA into shared memory, or 16-byte vectors into registers), loads the few hundred bytes of everything
else while they are on their way, and leaves the stores in flight when it moves on. Blocks are numbered by sequence, head
and rows, the last fastest, so that neighbours stream through consecutive memory of one slot.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ._branches import when
from ._numerics import exp, silu, softplus
from ._selective_state_update_call import Floats, Integers, Static
from ._selective_state_update_launch import Launch
from ._selective_state_update_tiles import DirectTiles, StagedTiles, load
from ._stochastic_rounding import block_width, counter, random_bits, stochastic_round

_NAMES = (*Floats._fields[1:], *Integers._fields)


def run(static: Static, launch: Launch, floats: Floats, integers: Integers) -> tuple[jax.Array, jax.Array]:
    """(y, new state)."""
    dims = static.dims
    operands = {name: array for name, array in zip(_NAMES, (*floats[1:], *integers), strict=True) if array is not None}
    state = jax.new_ref(floats.state)
    packed = integers.cu_seqlens is not None
    per_sequence = dims.H * (dims.P // launch.BLOCK_SIZE_M) // launch.tiles_per_block
    tile = (launch.tiles_per_block, launch.BLOCK_SIZE_M, dims.N)
    kernel = plgpu.kernel(
        partial(_body, static, launch, tuple(operands), packed),
        out_type=jax.ShapeDtypeStruct(floats.x.shape, floats.x.dtype),
        scratch_types=[plgpu.SMEM(tile, floats.state.dtype), plgpu.Barrier(num_barriers=launch.tiles_per_block)]
        if launch.use_tma
        else [],
        # Packed, one more sequence than there are: its blocks zero the rows that belong to nobody.
        grid=((dims.N_seq + packed) * per_sequence,),
        grid_names=("block",),
        kernel_name="selective_state_update",
        compiler_params=plgpu.CompilerParams(
            # A barrier before and after each store has nothing to order where every element belongs to one thread, which
            # reads it before it writes it, and a tile of shared memory is filled once. Where a small tile is held more
            # than once, one thread's store must not come before another's load.
            unsafe_no_auto_barriers=launch.layout.copies == 1,
            # Rows are summed within a warp.
            reduction_scratch_bytes=0,
        ),
    )
    y = kernel(*operands.values(), state)
    return y, state[...]


def _body(static: Static, launch: Launch, names: tuple[str, ...], packed: bool, *refs: Any) -> None:
    scratch = refs[len(names) + 2 :]
    given = dict(zip((*names, "state", "y"), refs, strict=False))
    refs_by_name = SimpleNamespace(**{name: given.get(name) for name in (*_NAMES, "state", "y")})
    block = _Block(static, launch, refs_by_name, *(scratch or (None, None)))
    (block.packed if packed else block.one_token)()


class _Block:
    """What one thread block does. `rows` and `h` below are a tile's first row of headdim and its head."""

    def __init__(self, static: Static, launch: Launch, refs: Any, tiles: Any, barriers: Any):
        self.static, self.launch, self.refs, self.tiles, self.barriers = static, launch, refs, tiles, barriers
        dims = self.dims = static.dims
        self.tile = launch.layout.tile
        self.row, self.column = self.tile.reduce(1), self.tile.reduce(0)
        per_head = dims.P // launch.BLOCK_SIZE_M
        block = lax.axis_index("block")
        per_sequence = dims.H * per_head // launch.tiles_per_block
        self.n = block // per_sequence
        first = block % per_sequence * launch.tiles_per_block
        # All of a block's tiles are in one head, or they are all the tiles of some heads of one group.
        heads = max(1, launch.tiles_per_block // per_head)
        in_head = launch.tiles_per_block // heads
        head, row = first // per_head, first % per_head * launch.BLOCK_SIZE_M
        self.heads = [head + i for i in range(heads)]
        self.rows = [row + i * launch.BLOCK_SIZE_M for i in range(in_head)]
        self.group = head // (dims.H // dims.G)
        self.all_tiles = [(h, rows) for h in self.heads for rows in self.rows]

    # One token for every sequence.

    def one_token(self) -> None:
        n, S = self.n, self.dims.S
        source, target = self.slots()
        if self.refs.source is None:
            self.update(n, source, target, always=True)
            return
        padding = self.static.is_padding(source)
        same = self.refs.target is None and self.refs.accepted is None
        live = jnp.logical_not(padding) & (source < S if same else (source < S) & (target < S))

        @when(live)
        def _():
            self.update(n, source, target, always=same)

        @when(jnp.logical_not(live))
        def _():
            self.fill(n, jnp.where(padding, jnp.float32(0), jnp.float32(jnp.nan)))

    def slots(self) -> tuple[jax.Array, jax.Array]:
        """(source, target) of the sequence; in speculative decode the target of its first token."""
        n, refs = self.n, self.refs
        if refs.source is None:
            return n, n
        if refs.accepted is None:
            source = refs.source[n]
            return source, source if refs.target is None else refs.target[n]
        column = jnp.clip(refs.accepted[n] - 1, 0, self.dims.T_max - 1)
        return refs.source[n, column], (refs.source if refs.target is None else refs.target)[n, 0]

    def update(self, t: jax.Array, source: jax.Array, target: jax.Array, always: bool) -> None:
        """Token t of a live sequence. `always`: the target is known to be a slot that keeps the state."""
        states = self.states(source, target, always)
        B, C = self.load_BC(t)
        i = 0
        for h in self.heads:
            weights = self.load_head(t, h)
            for rows in self.rows:
                chunks = [rows + j for j in range(0, self.launch.BLOCK_SIZE_M, self.launch.chunk)]
                inputs = [self.load_rows(t, h, at) for at in chunks]
                states.wait(i)
                for j, at in enumerate(chunks):
                    s, y = self.step(states.read(i, j), h, at, B, C, weights, inputs[j])
                    self.refs.y[t, h, pl.ds(at, self.launch.chunk)] = y
                    states.write(i, j, self.rounded(s, target, h, at))
                states.send(i)
                i += 1
        states.drain()

    # Packed sequences.

    def packed(self) -> None:
        dims, refs = self.dims, self.refs
        T, N_seq = dims.T, dims.N_seq

        def bound(i: jax.Array | int) -> jax.Array:
            return jnp.clip(refs.cu_seqlens[i], 0, T)

        @when(self.n == N_seq)
        def _():
            first, last = bound(0), bound(N_seq)
            self.fill_range(0, first, jnp.float32(0))
            self.fill_range(last, T, jnp.float32(0))

        @when(self.n < N_seq)
        def _():
            begin = bound(self.n)
            end = jnp.maximum(bound(self.n + 1), begin)

            @when(begin < end)
            def _():
                self.sequence(begin, end)

    def sequence(self, begin: jax.Array, end: jax.Array) -> None:
        refs, S = self.refs, self.dims.S
        source, target = self.slots()
        if refs.source is None:
            self.tokens(begin, end, source, target)
            return
        padding = self.static.is_padding(source)
        live = jnp.logical_not(padding) & (source < S)
        if refs.target is not None and refs.accepted is None:
            live = live & (target < S)

        @when(live)
        def _():
            self.tokens(begin, end, source, target)

        @when(jnp.logical_not(live))
        def _():
            self.fill_range(begin, end, jnp.where(padding, jnp.float32(0), jnp.float32(jnp.nan)))

    def tokens(self, begin: jax.Array, end: jax.Array, source: jax.Array, target: jax.Array) -> None:
        """A live sequence: its one tile stays in registers from its first token to its last."""
        launch, refs, T_max = self.launch, self.refs, self.dims.T_max
        ((h, rows),) = self.all_tiles
        states = self.states(source, target, always=refs.target is None)
        states.wait(0)

        def token(t: jax.Array, s: jax.Array) -> jax.Array:
            B, C = self.load_BC(t)
            s, y = self.step(s, h, rows, B, C, self.load_head(t, h), self.load_rows(t, h, rows))
            if refs.accepted is None:
                refs.y[t, h, pl.ds(rows, launch.BLOCK_SIZE_M)] = y
                return s
            # Speculative decode keeps the state after every token that has a slot.
            place = t - begin
            to = (refs.source if refs.target is None else refs.target)[self.n, jnp.minimum(place, T_max - 1)]
            to = jnp.where(place < T_max, to, -1)
            good = jnp.broadcast_to(to < self.dims.S, y.shape)
            refs.y[t, h, pl.ds(rows, launch.BLOCK_SIZE_M)] = jnp.where(good, y, jnp.full_like(y, jnp.nan))

            @when(self.keeps(to))
            def _():
                refs.state[to, h, pl.ds(rows, launch.BLOCK_SIZE_M)] = self.rounded(s, to, h, rows)

            return s

        s = lax.fori_loop(begin, end, token, states.read(0, 0).astype(jnp.float32))
        if refs.accepted is None:
            states.write(0, 0, self.rounded(s, target, h, rows))
            states.send(0)
            states.drain()

    # The recurrence.

    def step(self, s, h, rows, B, C, weights, inputs) -> tuple[jax.Array, jax.Array]:
        """(state, y) of a chunk of rows: the state in fp32, y in its dtype."""
        dims, refs = self.dims, self.refs
        (step, A, D), (x, z, row_step, row_D) = weights, inputs
        count = x.shape[0]
        s = s.astype(jnp.float32)
        if row_step is not None:
            step = row_step
        if not dims.tied_A:
            A = self.load(refs.A.at[h, pl.ds(rows, count)], self.tile)
        if row_step is None or not dims.tied_A:
            decay = exp(A * self.spread(step, count))
        else:
            decay = self.spread(exp(A * step), count)
        s = s * decay + self.over_columns(step * x) * self.over_rows(B, count)
        y = jnp.sum(s * self.over_rows(C, count), axis=1)
        D = D if row_D is None else row_D
        if D is not None:
            y = y + D * x
        if z is not None:
            y = y * silu(z)
        return s, y.astype(refs.y.dtype)

    def spread(self, step: jax.Array, count: int) -> jax.Array:
        """A number for every row as a tile; a number for the head as it is."""
        return step if step.ndim == 0 else self.over_columns(step)

    def over_columns(self, rows: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(rows, (*rows.shape, self.dims.N), (0,))

    def over_rows(self, columns: jax.Array, count: int) -> jax.Array:
        return lax.broadcast_in_dim(columns, (count, *columns.shape), (1,))

    # Loads, all to fp32.

    def load(self, ref: Any, layout: Any) -> jax.Array:
        return load(ref, layout).astype(jnp.float32)

    def load_BC(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        B, C = (self.load(ref.at[t, self.group], self.column) for ref in (self.refs.B, self.refs.C))
        return B, C

    def load_head(self, t: jax.Array, h: jax.Array) -> tuple[jax.Array | None, ...]:
        """(step, A, D) of a head where they are one number each; the step with its bias and softplus."""
        dims, refs = self.dims, self.refs
        step = A = D = None
        if dims.tied_dt and dims.tied_dt_bias:
            step = refs.dt[t, h].astype(jnp.float32)
            if refs.dt_bias is not None:
                step = step + refs.dt_bias[h].astype(jnp.float32)
            if self.static.dt_softplus:
                step = softplus(step)
        if dims.tied_A:
            A = refs.A[h].astype(jnp.float32)
        if refs.D is not None and dims.tied_D:
            D = refs.D[h].astype(jnp.float32)
        return step, A, D

    def load_rows(self, t: jax.Array, h: jax.Array, rows: jax.Array) -> tuple[jax.Array | None, ...]:
        """(x, z, step, D) of a chunk of rows; step and D where every row has its own."""
        dims, refs = self.dims, self.refs
        at = pl.ds(rows, self.launch.chunk)

        def load_row(ref: Any) -> jax.Array:
            return self.load(ref, self.row)

        x = load_row(refs.x.at[t, h, at])
        z = None if refs.z is None else load_row(refs.z.at[t, h, at])
        step = D = None
        if not (dims.tied_dt and dims.tied_dt_bias):
            if dims.tied_dt:
                step = lax.broadcast_in_dim(refs.dt[t, h].astype(jnp.float32), x.shape, ())
            else:
                step = load_row(refs.dt.at[t, h, at])
            if refs.dt_bias is not None:
                step = step + (
                    refs.dt_bias[h].astype(jnp.float32) if dims.tied_dt_bias else load_row(refs.dt_bias.at[h, at])
                )
            if self.static.dt_softplus:
                step = softplus(step)
        if refs.D is not None and not dims.tied_D:
            D = load_row(refs.D.at[h, at])
        return x, z, step, D

    # Stores.

    def states(self, source: jax.Array, target: jax.Array, always: bool) -> StagedTiles | DirectTiles:
        """This block's tiles of the state, on their way from `source`."""
        read = [self.refs.state.at[source, h, pl.ds(rows, self.launch.BLOCK_SIZE_M)] for h, rows in self.all_tiles]
        write = [self.refs.state.at[target, h, pl.ds(rows, self.launch.BLOCK_SIZE_M)] for h, rows in self.all_tiles]
        keep = None if always else self.keeps(target)
        if self.launch.use_tma:
            return StagedTiles(self.launch, read, write, keep, self.tiles, self.barriers)
        return DirectTiles(self.launch, read, write, keep)

    def keeps(self, slot: jax.Array) -> jax.Array:
        return jnp.logical_not(self.static.is_padding(slot)) & (slot < self.dims.S)

    def rounded(self, s: jax.Array, slot: jax.Array, h: jax.Array, rows: jax.Array) -> jax.Array:
        """The state as it is stored; the random bits are those of the slot that it goes to."""
        dims, dtype = self.dims, self.refs.state.dtype
        if self.refs.key is None:
            return s.astype(dtype)
        width, count = block_width(dims.N), s.shape[0]
        column = plgpu.broadcasted_iota(jnp.int32, (count, width), 1, layout=self.tile)
        row = plgpu.broadcasted_iota(jnp.int32, (count, width), 0, layout=self.tile)
        local = ((row + rows) * width + column).astype(jnp.uint32)
        base = (slot * dims.H + h).astype(jnp.uint32)
        high, low = counter(base, dims.P, dims.N, local)
        bits = random_bits((self.refs.key[0], self.refs.key[1]), high, low, dims.N)
        return stochastic_round(s, bits, dtype)

    def fill(self, t: jax.Array, value: jax.Array) -> None:
        """This block's rows of y of token t."""
        launch, y = self.launch, self.refs.y
        filled = lax.broadcast_in_dim(value.astype(y.dtype), (launch.BLOCK_SIZE_M,), ())
        filled = plgpu.layout_cast(filled, self.row)
        for h, rows in self.all_tiles:
            y[t, h, pl.ds(rows, launch.BLOCK_SIZE_M)] = filled

    def fill_range(self, begin: jax.Array | int, end: jax.Array | int, value: jax.Array) -> None:
        lax.fori_loop(begin, end, lambda t, _: self.fill(t, value), None)
