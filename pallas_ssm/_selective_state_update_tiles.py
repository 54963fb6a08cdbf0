"""How a thread block's tiles of the state come and go: through shared memory by TMA, or straight through registers.

Both ask for all tiles when they are made, so that as many bytes as possible are in flight before the first is needed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ._branches import when
from ._selective_state_update_launch import Launch


def load(ref: Any, layout: Any) -> jax.Array:
    # optimized=False: a plain vector load of what each thread owns. Its rows lie too far apart for anything wider.
    return plgpu.load(ref, layout=layout, optimized=False)


class _Tiles:
    """Tile i is read from `sources[i]` and written to `targets[i]`, in chunks of rows, j of them."""

    def __init__(self, launch: Launch, sources: Sequence[Any], targets: Sequence[Any], keep: jax.Array | None):
        """`keep`: whether the targets are to be written at all; None where they always are."""
        self._launch, self._sources, self._targets, self._keep = launch, sources, targets, keep

    def _rows(self, j: int) -> Any:
        return pl.ds(j * self._launch.chunk, self._launch.chunk)

    def _if_kept(self, action: Callable[[], None]) -> None:
        if self._keep is None:
            action()
        else:
            when(self._keep)(action)


class StagedTiles(_Tiles):
    """By TMA into shared memory and back, in place; `shared` is [tiles_per_block, BLOCK_SIZE_M, N]."""

    def __init__(
        self, launch: Launch, sources: Sequence[Any], targets: Sequence[Any], keep, shared: Any, barriers: Any
    ):
        super().__init__(launch, sources, targets, keep)
        self._shared, self._barriers = shared, barriers
        for i, source in enumerate(sources):
            plgpu.copy_gmem_to_smem(source, shared.at[i], barriers.at[i])

    def wait(self, i: int) -> None:
        plgpu.barrier_wait(self._barriers.at[i])

    def read(self, i: int, j: int) -> jax.Array:
        return load(self._shared.at[i, self._rows(j)], self._launch.layout.tile)

    def write(self, i: int, j: int, s: jax.Array) -> None:
        self._shared[i, self._rows(j)] = s

    def send(self, i: int) -> None:
        """Starts the store of tile i, whose chunks are all written."""
        plgpu.commit_smem()
        self._if_kept(lambda: plgpu.copy_smem_to_gmem(self._shared.at[i], self._targets[i]))

    def drain(self) -> None:
        # The stores may still be under way when the block ends, but its shared memory must have been read.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class DirectTiles(_Tiles):
    """By 16-byte loads into registers, and stores out of them."""

    def __init__(self, launch: Launch, sources: Sequence[Any], targets: Sequence[Any], keep):
        super().__init__(launch, sources, targets, keep)
        chunks = range(launch.BLOCK_SIZE_M // launch.chunk)
        self._held = [[load(source.at[self._rows(j)], launch.layout.tile) for j in chunks] for source in sources]

    def wait(self, i: int) -> None:
        pass

    def read(self, i: int, j: int) -> jax.Array:
        return self._held[i][j]

    def write(self, i: int, j: int, s: jax.Array) -> None:
        def store() -> None:
            self._targets[i][self._rows(j)] = s

        self._if_kept(store)

    def send(self, i: int) -> None:
        pass

    def drain(self) -> None:
        pass
