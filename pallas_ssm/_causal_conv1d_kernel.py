"""The Mosaic GPU kernel of `causal_conv1d`: blocks of BLOCK_SIZE_T tokens by BLOCK_SIZE_D channels.

A block's inputs come by TMA into shared memory, the W - 1 rows before them too, and its outputs leave the same way from the
same place. In between, every thread walks down a strip of tokens of its own channels with the last W - 1 inputs in
registers: each input is loaded and converted once. TMA zero-fills and drops what lies outside the arrays, so no load or
store is masked.

Packed, sequence n has the blocks from cu_seqlens[n] // BLOCK_SIZE_T + n on: enough of them whatever the lengths are, and
found by a binary search, so that nothing has to be known or computed before the launch. A sequence's first block writes its
final state. It is the one that reads the initial state, which may be in the same place.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ._branches import when
from ._by_lane import BY_LANE
from ._causal_conv1d_call import Floats, Integers, Static
from ._causal_conv1d_launch import PrefillLaunch, row_blocks
from ._causal_conv1d_taps import convolve, load, load_taps, select, stage_taps
from ._copies import copy_rows
from ._indices import unravel

_INPUTS = ("x", "weight", "bias", "initial", *Integers._fields)


def run(
    static: Static, launch: PrefillLaunch, floats: Floats, integers: Integers
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """(parts of y, final state)."""
    dims, dtype = static.dims, floats.x.dtype
    given = {"x": floats.x, "weight": floats.weight, "bias": floats.bias, **integers._asdict()}
    if not static.pool:
        given["initial"] = floats.state
    given = {name: array for name, array in given.items() if array is not None}
    parts = [jax.ShapeDtypeStruct((dims.B, dims.rows, size), dtype) for size in static.sizes]
    pool = jax.new_ref(floats.state) if static.pool else None
    if pool is None:
        parts.append(jax.ShapeDtypeStruct((dims.N_seq, dims.W - 1, dims.D), dtype))
    kernel = plgpu.kernel(
        partial(_body, static, launch, tuple(given)),
        out_type=parts,
        scratch_types=[
            plgpu.SMEM((launch.strips, launch.strip_rows + dims.W - 1, launch.BLOCK_SIZE_D), dtype),
            plgpu.SMEM((dims.W + 1, launch.BLOCK_SIZE_D), jnp.float32),
            plgpu.Barrier(num_arrivals=launch.strips),
            plgpu.Barrier(),
        ],
        # One axis, because the others stop at 65,535; channels fastest, so that blocks that run together read and write
        # whole rows.
        grid=(dims.B * row_blocks(static, launch.BLOCK_SIZE_T) * (dims.D // launch.BLOCK_SIZE_D),),
        grid_names=("block",),
        kernel_name="causal_conv1d",
        compiler_params=BY_LANE,
    )
    results = kernel(*given.values(), *([] if pool is None else [pool]))
    return (tuple(results), pool[...]) if pool is not None else (tuple(results[:-1]), results[-1])


def _body(static: Static, launch: PrefillLaunch, names: tuple[str, ...], *refs: Any) -> None:
    count = len(static.sizes)
    inputs = dict(zip(names, refs, strict=False))
    # An aliased pool is the last input, a final state of its own the last output.
    rest = refs[len(names) :]
    state, parts = (rest[0], rest[1 : count + 1]) if static.pool else (rest[count], rest[:count])
    by_name = {name: inputs.get(name) for name in _INPUTS}
    _Block(static, launch, SimpleNamespace(**by_name, state=state, parts=parts), *rest[count + 1 :]).run()


class _Block:
    """What one thread block does. `start` and `count` are its first token and how many it has."""

    def __init__(
        self, static: Static, launch: PrefillLaunch, refs: Any, tile: Any, taps: Any, arrived: Any, history_arrived: Any
    ):
        self.static, self.launch, self.dims, self.refs = static, launch, static.dims, refs
        self.tile, self.taps, self.arrived, self.history_arrived = tile, taps, arrived, history_arrived
        self.history = self.dims.W - 1
        block, blocks = lax.axis_index("block"), row_blocks(static, launch.BLOCK_SIZE_T)
        across = self.dims.D // launch.BLOCK_SIZE_D
        self.batch, self.block, column = unravel(block, blocks, across)
        self.column = column * launch.BLOCK_SIZE_D
        self.channels = pl.ds(self.column, launch.BLOCK_SIZE_D)
        self.layout = launch.layout.tile
        self.shape = (launch.strips, launch.BLOCK_SIZE_D)

    def run(self) -> None:
        static, launch, dims = self.static, self.launch, self.dims
        n, begin, end, start = self.locate()
        aligned = static.chunk_size is not None
        self.row = self.block * launch.BLOCK_SIZE_T if aligned else start
        count = jnp.clip(end - start, 0, launch.BLOCK_SIZE_T)
        first = start == begin
        some = count > 0

        fill = jnp.float32(0)
        real: Any = True  # a sequence, and one that has a state
        if dims.packed and not aligned:
            real = n < dims.N_seq
        slot = n
        if static.pool:
            # Blocks of what belongs to nobody look at the last sequence's slot, and do nothing with it.
            slot = self.refs.slots[jnp.minimum(n, dims.N_seq - 1)]
            padding = static.is_padding(slot)
            fill = jnp.where(padding | jnp.logical_not(real), fill, jnp.float32(jnp.nan))
            real = real & jnp.logical_not(padding) & (slot < dims.S)

        if static.pool or dims.packed or aligned:

            @when(real & some)
            def _():
                self.convolve(n, slot, start, count, first)

            @when(jnp.logical_not(real & some) if aligned else jnp.logical_not(real) & some)
            def _():
                self.fill(count, fill)

            # Here, once: a part's stores are what takes longest to compile.
            when(aligned or some)(lambda: self.store(count))
        else:  # every block has a token
            self.convolve(n, slot, start, count, first)
            self.store(count)

        # A slot keeps its state where there is no token; a final state has to be written.
        @when(real & first & some if static.pool else real & first)
        def _():
            self.finish(n, slot, begin, end - begin)

        # Shared memory may be given to the next block only when the copies have read it.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    # Which tokens.

    def bound(self, i: jax.Array) -> jax.Array:
        """cu_seqlens[i], within the tokens whatever it holds; the first sequence begins at 0."""
        return jnp.where(i == 0, 0, jnp.clip(self.refs.cu_seqlens[i], 0, self.dims.T))

    def locate(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(sequence, its first token, its end, this block's first token). Sequence N_seq is what belongs to nobody."""
        launch, dims = self.launch, self.dims
        rows = launch.BLOCK_SIZE_T
        if not dims.packed:
            return self.batch, jnp.int32(0), jnp.int32(dims.T), self.block * rows
        unit = self.static.chunk_size or rows
        last = dims.N_seq if self.static.chunk_size is None else dims.N_seq - 1

        def first_block(n: jax.Array) -> jax.Array:
            return (lax.div(self.bound(n), jnp.int32(unit)) + n) * (unit // rows)

        n = jnp.int32(0)
        for step in (1 << i for i in reversed(range(last.bit_length()))):
            there = jnp.minimum(n + step, last)
            n = jnp.where((n + step <= last) & (first_block(there) <= self.block), there, n)
        begin = self.bound(n)
        end = jnp.maximum(self.bound(jnp.minimum(n + 1, dims.N_seq)), begin)
        if self.static.chunk_size is None:
            end = jnp.where(n == dims.N_seq, dims.T, end)
        return n, begin, end, begin + (self.block - first_block(n)) * rows

    # The convolution.

    def convolve(self, n: jax.Array, slot: jax.Array, start: jax.Array, count: jax.Array, first: jax.Array) -> None:
        launch, dims, refs, tile = self.launch, self.dims, self.refs, self.tile
        history, strip_rows = self.history, launch.strip_rows
        may_continue = not (not dims.packed and dims.T <= launch.BLOCK_SIZE_T)
        for g in range(launch.strips):
            if g > 0:
                self.fetch(start + (g * strip_rows - history), strip_rows + history, g, 0)
                continue
            # A sequence's first token has no tokens before it.
            when(first)(partial(self.fetch, start, strip_rows, 0, history))
            if may_continue:
                when(jnp.logical_not(first))(partial(self.fetch, start - history, strip_rows + history, 0, 0))
        known = self.initial(n, slot)
        if known is not None:
            ref, has = known

            @when(first & has)
            def _():
                plgpu.copy_gmem_to_smem(ref, tile.at[0, pl.ds(0, history)], self.history_arrived)

        stage_taps(refs.weight, refs.bias, self.channels, self.taps, launch.layout)
        taps, bias = load_taps(dims.W, refs.bias, self.taps, launch.layout)
        plgpu.barrier_wait(self.arrived)
        blank = first
        if known is not None:
            when(first & known[1])(lambda: plgpu.barrier_wait(self.history_arrived))
            blank = first & jnp.logical_not(known[1])
        window = [self.tokens(i).astype(jnp.float32) for i in range(history)]
        if refs.initial is None:
            # The strip of a sequence's first token begins with zeros.
            strip = plgpu.broadcasted_iota(jnp.int32, self.shape, 0, layout=self.layout)
            known_rows = (strip > 0) | jnp.logical_not(blank)
            window = [select(known_rows, x, 0.0) for x in window]

        def step(i: jax.Array, window: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            at = i * launch.unroll
            rows = list(window)
            rows += [self.tokens(at + history + k).astype(jnp.float32) for k in range(launch.unroll)]
            for k in range(launch.unroll):
                y = convolve(rows[k : k + dims.W], taps, bias, self.static.silu)
                # In the place of the window's oldest input, which no other thread wants.
                tile[pl.ds(0, launch.strips), at + k] = y.astype(tile.dtype)
            return tuple(rows[launch.unroll :])

        lax.fori_loop(jnp.int32(0), jnp.int32(strip_rows // launch.unroll), step, tuple(window))
        if self.static.chunk_size is not None:

            @when(count < launch.BLOCK_SIZE_T)
            def _():
                self.fill(count, None)

    def initial(self, n: jax.Array, slot: jax.Array) -> tuple[Any, Any] | None:
        """(where the W - 1 inputs before sequence n are, whether there are any), if there can be."""
        if self.static.pool:
            return self.refs.state.at[slot, pl.ds(0, self.history), self.channels], self.has_initial(n)
        if self.refs.initial is not None:
            return self.refs.initial.at[n, :, self.channels], True
        return None

    def has_initial(self, n: jax.Array) -> jax.Array:
        return self.refs.has_initial[n]

    def fetch(self, start: jax.Array, count: int, g: int, at: int) -> None:
        """`count` tokens from `start` on into strip g, from row `at` on."""
        tokens = self.refs.x.at[self.batch, pl.ds(start, count), self.channels]
        plgpu.copy_gmem_to_smem(tokens, self.tile.at[g, pl.ds(at, count)], self.arrived)

    def tokens(self, i: Any) -> jax.Array:
        """Row i of every strip."""
        return load(self.tile.at[pl.ds(0, self.launch.strips), i], self.layout)

    # Outputs.

    def fill(self, count: jax.Array, value: jax.Array | None) -> None:
        """Zeros behind the first `count` rows, which become `value` where there is one."""
        launch = self.launch
        strip = plgpu.broadcasted_iota(jnp.int32, self.shape, 0, layout=self.layout) * launch.strip_rows
        dtype = self.tile.dtype

        def row(i: jax.Array, _: None) -> None:
            kept = self.tokens(i) if value is None else jnp.broadcast_to(value.astype(dtype), self.shape)
            self.tile[pl.ds(0, launch.strips), i] = select(strip + i < count, kept, 0.0)

        lax.fori_loop(jnp.int32(0), jnp.int32(launch.strip_rows), row, None)

    def store(self, count: jax.Array) -> None:
        """The block's rows of y; only the first `count` where another sequence's may follow."""
        plgpu.commit_smem()
        sizes, offsets = self.static.sizes, self.static.offsets
        for part, offset, size in zip(self.refs.parts, offsets, sizes, strict=True):
            if len(sizes) == 1:
                self.store_into(part, offset, count)
            else:
                mine = (self.column >= offset) & (self.column < offset + size)
                when(mine)(partial(self.store_into, part, offset, count))

    def store_into(self, part: Any, offset: int, count: jax.Array) -> None:
        launch = self.launch
        channels = pl.ds(self.column - offset, launch.BLOCK_SIZE_D)
        rows = launch.strip_rows

        def copy(g: Any, at: Any, size: int) -> None:
            target = part.at[self.batch, pl.ds(self.row + g * rows + at, size), channels]
            plgpu.copy_smem_to_gmem(self.tile.at[g, pl.ds(at, size)], target)

        def whole_strips(where: Callable[[int], Any] | None) -> None:
            for g in range(launch.strips):
                store = partial(copy, g, 0, rows)
                store() if where is None else when(where(g))(store)

        # What hangs over the array's end is dropped, what hangs over a batch row's end would be the next one's first rows.
        dense = not self.dims.packed and (self.dims.B == 1 or self.dims.T % launch.BLOCK_SIZE_T == 0)
        if dense or self.static.chunk_size is not None:
            whole_strips(None)
            return
        whole_strips(lambda g: count >= (g + 1) * rows)
        g, left = lax.div(count, jnp.int32(rows)), lax.rem(count, jnp.int32(rows))
        copy_rows(partial(copy, g), left)

    def finish(self, n: jax.Array, slot: jax.Array, begin: jax.Array, length: jax.Array) -> None:
        """The last W - 1 inputs of a sequence, which may reach into what came before it, to its final state."""
        history, refs, row = self.history, self.refs, self.launch.layout.row

        def write(rows: list[jax.Array]) -> None:
            for i, x in enumerate(rows):
                refs.state[slot, i, self.channels] = x

        def token(i: jax.Array) -> jax.Array:
            return load(refs.x.at[self.batch, i, self.channels], row)

        @when(length >= history)
        def _():
            write([token(begin + length - history + i) for i in range(history)])

        def write_short(short: int) -> None:
            before = [self.initial_row(n, slot, i) for i in range(short, history)]
            rows = before + [token(begin + i) for i in range(short)]
            # Some threads hold the same elements, and the state may be written where it was read.
            plgpu.commit_smem()
            write(rows)

        for short in range(history):
            when(length == short)(partial(write_short, short))

    def initial_row(self, n: jax.Array, slot: jax.Array, i: int) -> jax.Array:
        row = self.launch.layout.row
        if self.static.pool:
            x = load(self.refs.state.at[slot, i, self.channels], row)
            return select(self.has_initial(n), x, 0.0)
        if self.refs.initial is not None:
            return load(self.refs.initial.at[n, i, self.channels], row)
        return plgpu.layout_cast(jnp.zeros((self.launch.BLOCK_SIZE_D,), self.tile.dtype), row)
