"""Runs one implementation on a case's NumPy arguments and brings NumPy results back.

On a machine without a GPU both packages run in their interpreters. Which it is has to be settled before torch, triton and
jax are imported, so `prepare()` comes first, and everything here imports late.
"""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from .operators import OPERATORS, Operator

Runner = Callable[[tuple[np.ndarray, ...], dict[str, Any]], dict[str, np.ndarray]]

CHEAP_COMPILES = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
"""Of XLA_FLAGS, for code that runs once on a CPU."""


def prepare(interpret: bool | None = None) -> bool:
    """Chooses interpreters or GPU (by default: a GPU if `nvidia-smi` is there); True for interpreters."""
    if interpret is None:
        interpret = shutil.which("nvidia-smi") is None
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["JAX_PLATFORMS"] = "cpu"
        # The warpgroups of an interpreted block wait for each other in threads of XLA's pool, of which there is one a core.
        # Where a kernel has more warpgroups than the machine has cores, nobody may be left to end the waiting.
        os.environ.setdefault("PJRT_NPROC", "16")
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        # JAX would take three quarters of the GPU's memory, and torch needs its share.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return interpret


def to_torch(value: Any, device: str) -> Any:
    import torch

    if isinstance(value, np.dtype):
        return getattr(torch, value.name)
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.name == "bfloat16":  # torch does not know NumPy's bfloat16
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(value.copy()).to(device)


def from_torch(tensor: Any) -> np.ndarray:
    import ml_dtypes
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.cpu().numpy()


def torch_runner(operator: Operator, function: Callable | None, interpret: bool) -> Runner:
    """The Triton twin, or `function` in its place, which updates in place what the twin updates in place."""
    device = "cpu" if interpret else "cuda"
    if interpret:  # also for a candidate
        from triton_ssm._interpreter import mend

        mend()

    def run(arguments, keywords):
        import triton_ssm

        called = function or operator.function(triton_ssm, keywords)
        tensors = [to_torch(value, device) for value in arguments]
        returned = called(*tensors, **{name: to_torch(value, device) for name, value in keywords.items()})
        return {name: from_torch(tensor) for name, tensor in operator.torch_results(returned, tensors).items()}

    return run


def jax_runner(operator: Operator, function: Callable | None, interpret: bool, **options: Any) -> Runner:
    """The Pallas twin, or `function` in its place. Runs under jit, the state donated as a model would."""
    import jax
    import jax.numpy as jnp

    def run(arguments, keywords):
        import pallas_ssm

        called = function or functools.partial(operator.function(pallas_ssm, keywords), **options)
        arrays = {name: value for name, value in keywords.items() if isinstance(value, np.ndarray)}
        static = {name: value for name, value in keywords.items() if name not in arrays}
        donated = operator.mutated

        def call(state, others, named):
            positional = list(others)
            if donated is not None:
                positional.insert(donated, state)
            return called(*positional, **named, **static)

        with _mosaic_interpreter() if interpret else contextlib.nullcontext():
            positional = [jnp.array(value) for value in arguments]
            state = None if donated is None else positional.pop(donated)
            named = {name: jnp.array(value) for name, value in arrays.items()}
            returned = jax.block_until_ready(jax.jit(call, donate_argnums=0)(state, positional, named))
        return {name: np.asarray(array) for name, array in operator.named(returned).items()}

    return run


@contextlib.contextmanager
def _mosaic_interpreter():
    from .interpret_mosaic import interpreted

    with interpreted():
        yield


def twins(op: str, interpret: bool) -> dict[str, Runner]:
    """The implementations of `op` that the packages have, by name."""
    operator = OPERATORS[op]
    return {
        "triton": torch_runner(operator, None, interpret),
        "mosaic_gpu": jax_runner(operator, None, interpret, implementation="mosaic_gpu"),
        "xla": jax_runner(operator, None, interpret=False, implementation="xla"),
    }


def device(interpret: bool) -> Any:
    """The device whose tables serve this run."""
    import torch

    from triton_ssm._device import tuning_device

    return tuning_device(torch.device("cpu" if interpret else "cuda"))
