"""Runs Mosaic GPU kernels on the CPU, in JAX's interpreter, with its race detector on. Tests only.

Only what is traced inside the context is interpreted. The interpreter does not see layouts, nor the order in which blocks
would run; those are the compile gates' and the GPU's to test.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu


class RaceError(AssertionError):
    """The interpreter saw two accesses that nothing orders."""


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels run interpreted inside; a race is a `RaceError` on the way out."""
    interpreter.reset_gpu_interpret_mode_state()  # a kernel that failed leaves the next one a broken state
    try:
        # Memory that nobody wrote reads as NaN, so an element of an output that a kernel forgets is seen.
        params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
        with plgpu.force_gpu_interpret_mode(params):
            yield
            jax.effects_barrier()
        races = gpu_callbacks._races  # None until a kernel runs
        if races is not None and races.races_found:
            raise RaceError("the interpreter found a race; its log says where")
    finally:
        interpreter.reset_gpu_interpret_mode_state()
