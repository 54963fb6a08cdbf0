"""The Mosaic GPU kernel of `causal_conv1d_update`: a few tokens onto the state of each sequence, in place.

A block has BLOCK_SIZE_D channels of BLOCK_SIZE_B sequences, every thread its own channels of all of them. It asks for what
waits for no slot, the tokens and the taps, while the slots are on their way, and for the rows of all its slots before it
works on the first.
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
from ._causal_conv1d_call import Floats, Integers, Static
from ._causal_conv1d_launch import UpdateLaunch
from ._causal_conv1d_taps import convolve, load, select, stage_taps, write_taps
from ._indices import unravel

_INPUTS = ("x", "weight", "bias", *Integers._fields)
# Tokens of a packed sequence that are asked for at a time.
_TOKENS = 4


def run(static: Static, launch: UpdateLaunch, floats: Floats, integers: Integers) -> tuple[jax.Array, jax.Array]:
    """(y, new pool)."""
    dims, x = static.dims, floats.x
    given = {"x": x, "weight": floats.weight, "bias": floats.bias, **integers._asdict()}
    given = {name: array for name, array in given.items() if array is not None}
    pool = jax.new_ref(floats.state)
    kernel = plgpu.kernel(
        partial(_body, static, launch, tuple(given)),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM((dims.W + 1, launch.BLOCK_SIZE_D), jnp.float32)],
        # Packed, one more sequence than there are: its blocks zero the rows that belong to nobody.
        # One axis, because the others stop at 65,535.
        grid=((dims.N_seq // launch.BLOCK_SIZE_B + dims.packed) * (dims.D // launch.BLOCK_SIZE_D),),
        grid_names=("block",),
        kernel_name="causal_conv1d_update",
        compiler_params=plgpu.CompilerParams(
            # A thread reads only what it has written itself or what a barrier has announced.
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            approx_math=True,
            # Every array here has the one layout. To infer that takes seconds where many sequences are unrolled.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
    y = kernel(*given.values(), pool)
    return y, pool[...]


def _body(static: Static, launch: UpdateLaunch, names: tuple[str, ...], *refs: Any) -> None:
    inputs = dict(zip(names, refs, strict=False))
    pool, y, shared = refs[len(names) :]
    by_name = {name: inputs.get(name) for name in _INPUTS}
    block = _Block(static, launch, SimpleNamespace(**by_name, pool=pool, y=y), shared)
    (block.packed if static.dims.packed else block.one_token_each)()


class _Block:
    """What one thread block does. A row is [1, BLOCK_SIZE_D] once it is in registers."""

    def __init__(self, static: Static, launch: UpdateLaunch, refs: Any, shared: Any):
        self.static, self.launch, self.dims, self.refs, self.shared = static, launch, static.dims, refs, shared
        self.history = self.dims.W - 1
        row, column = unravel(lax.axis_index("block"), self.dims.D // launch.BLOCK_SIZE_D)
        self.first = row * launch.BLOCK_SIZE_B
        self.channels = pl.ds(column * launch.BLOCK_SIZE_D, launch.BLOCK_SIZE_D)
        self.layout = launch.layout.tile

    # One token for every sequence.

    def one_token_each(self) -> None:
        refs, batch = self.refs, self.launch.BLOCK_SIZE_B
        sequences = [self.first + i for i in range(batch)]
        slots = sequences if refs.slots is None else [refs.slots[n] for n in sequences]
        tokens = [self.load(refs.x.at[pl.ds(n, 1), self.channels]) for n in sequences]
        write_taps(refs.weight, refs.bias, self.channels, self.shared, self.launch.layout)
        if refs.slots is None:
            self.together(sequences, slots, tokens)
            return
        all_live = self.is_live(slots[0])
        for slot in slots[1:]:
            all_live = all_live & self.is_live(slot)
        when(all_live)(partial(self.together, sequences, slots, tokens))

        @when(jnp.logical_not(all_live))
        def _():
            # One after the other, and not unrolled: there are few such blocks.
            def one(i: jax.Array, _: None) -> None:
                n = self.first + i
                slot = refs.slots[n]

                @when(self.is_live(slot))
                def _():
                    self.together([n], [slot], [self.load(refs.x.at[pl.ds(n, 1), self.channels])])

                @when(jnp.logical_not(self.is_live(slot)))
                def _():
                    self.fill(n, n + 1, self.mark(self.static.is_padding(slot)))

            lax.fori_loop(0, batch, one, None)

    def together(self, sequences: list[jax.Array], slots: list[jax.Array], tokens: list[jax.Array]) -> None:
        """A token onto each of some live sequences."""
        before = [self.before(slot, self.offset(n)) for n, slot in zip(sequences, slots, strict=True)]
        plgpu.commit_smem()
        taps, bias = self.load_taps()
        for n, slot, history, x in zip(sequences, slots, before, tokens, strict=True):
            self.refs.y[pl.ds(n, 1), self.channels] = self.step([*history, x], taps, bias)
            self.keep(slot, [*history[1:], x])

    def is_live(self, slot: jax.Array) -> jax.Array:
        return jnp.logical_not(self.static.is_padding(slot)) & (slot < self.dims.S)

    # Packed sequences.

    def packed(self) -> None:
        dims, refs, n = self.dims, self.refs, self.first
        T, N_seq = dims.T, dims.N_seq

        def bound(i: jax.Array) -> jax.Array:
            # The first sequence begins at 0.
            return jnp.where(i == 0, 0, jnp.clip(refs.cu_seqlens[i], 0, T))

        begin = bound(n)
        end = jnp.maximum(bound(jnp.minimum(n + 1, N_seq)), begin)
        real = n < N_seq
        slot = n if refs.slots is None else refs.slots[jnp.minimum(n, N_seq - 1)]
        padding = self.static.is_padding(slot) if refs.slots is not None else jnp.logical_not(real)
        live = real & jnp.logical_not(padding) & (slot < dims.S)
        some = begin < end

        @when(live & some)
        def _():
            self.tokens(n, begin, end, slot)

        @when(jnp.logical_not(live))
        def _():
            self.fill(begin, jnp.where(real, end, T), self.mark(padding | jnp.logical_not(real)))

    def tokens(self, n: jax.Array, begin: jax.Array, end: jax.Array, slot: jax.Array) -> None:
        """A live sequence, from its first token to its last."""
        refs, speculative = self.refs, self.refs.accepted is not None
        window = self.before(slot, self.offset(n))
        stage_taps(refs.weight, refs.bias, self.channels, self.shared, self.launch.layout)
        taps, bias = self.load_taps()
        if speculative:
            self.keep(slot, window[1:])

        def some(i: jax.Array, window: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            t = begin + i * _TOKENS
            rows = [jnp.minimum(t + k, end - 1) for k in range(_TOKENS)]
            rows = [self.load(refs.x.at[pl.ds(row, 1), self.channels]) for row in rows]
            for k, x in enumerate(rows):
                y = self.step((*window, x), taps, bias)
                there = t + k < end

                @when(there)
                def _(k=k, y=y):
                    refs.y[pl.ds(t + k, 1), self.channels] = y

                if speculative:
                    at = self.history - 1 + t + k - begin

                    @when(there & (at < self.dims.L))
                    def _(at=at, x=x):
                        self.store(slot, at, x)

                moved = (*window[1:], x)
                window = tuple(select(there, new, old) for new, old in zip(moved, window, strict=True))
            return window

        window = lax.fori_loop(
            jnp.int32(0), lax.div(end - begin + (_TOKENS - 1), jnp.int32(_TOKENS)), some, tuple(window)
        )
        if not speculative:
            self.keep(slot, window)

    # Rows.

    def load(self, ref: Any) -> jax.Array:
        return load(ref, self.layout)

    def offset(self, n: jax.Array) -> jax.Array | int:
        """The slot's row that the history begins at."""
        if self.refs.accepted is None:
            return 0
        return jnp.clip(self.refs.accepted[n] - 1, 0, self.dims.L - self.history)

    def before(self, slot: jax.Array, offset: jax.Array | int) -> list[jax.Array]:
        """The last W - 1 inputs."""
        pool = self.refs.pool
        return [self.load(pool.at[slot, pl.ds(offset + i, 1), self.channels]) for i in range(self.history)]

    def load_taps(self) -> tuple[list[jax.Array], jax.Array | None]:
        width = self.dims.W
        taps = [self.load(self.shared.at[pl.ds(j, 1)]) for j in range(width)]
        return taps, None if self.refs.bias is None else self.load(self.shared.at[pl.ds(width, 1)])

    def step(self, window: Any, taps: list[jax.Array], bias: jax.Array | None) -> jax.Array:
        rows = [x.astype(jnp.float32) for x in window]
        return convolve(rows, taps, bias, self.static.silu).astype(self.refs.y.dtype)

    def store(self, slot: jax.Array, row: Any, x: jax.Array) -> None:
        self.refs.pool[slot, pl.ds(row, 1), self.channels] = x

    def keep(self, slot: jax.Array, rows: Any) -> None:
        for i, x in enumerate(rows):
            self.store(slot, i, x)

    def mark(self, padding: jax.Array) -> jax.Array:
        return jnp.where(padding, jnp.float32(0), jnp.float32(jnp.nan))

    def fill(self, begin: jax.Array, end: jax.Array, value: jax.Array) -> None:
        y = self.refs.y
        row = jnp.broadcast_to(value.astype(y.dtype), (1, self.launch.BLOCK_SIZE_D))
        row = plgpu.layout_cast(row, self.layout)

        def one(t: jax.Array, _: None) -> None:
            y[pl.ds(t, 1), self.channels] = row

        lax.fori_loop(begin, end, one, None)
