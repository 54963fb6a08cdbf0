"""Runs one implementation on a case's NumPy arguments and brings NumPy results back.

On a machine without a GPU both packages run in their interpreters. Which it is has to be settled before torch, triton and
jax are imported, so `prepare()` comes first, and everything here imports late.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

Result = tuple[np.ndarray, np.ndarray]
Runner = Callable[[tuple[np.ndarray, ...], dict[str, Any]], Result]


def prepare(interpret: bool | None = None) -> bool:
    """Chooses interpreters or GPU (by default: a GPU if `nvidia-smi` is there); True for interpreters."""
    if interpret is None:
        interpret = shutil.which("nvidia-smi") is None
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        # JAX would take three quarters of the GPU's memory, and torch needs its share.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return interpret


def to_torch(value: Any, device: str) -> Any:
    import torch

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


def torch_runner(function: Callable, interpret: bool) -> Runner:
    """`function` mutates its first argument and returns y, as the Triton twin does."""
    device = "cpu" if interpret else "cuda"
    if interpret:
        from . import interpret_triton  # noqa: F401

    def run(arguments, keywords):
        tensors = [to_torch(value, device) for value in arguments]
        y = function(*tensors, **{name: to_torch(value, device) for name, value in keywords.items()})
        return from_torch(y), from_torch(tensors[0])

    return run


def jax_runner(function: Callable, interpret: bool) -> Runner:
    """`function` returns (y, state), as the Pallas twin does. Runs under jit, the state donated as a model would."""
    import jax
    import jax.numpy as jnp

    def run(arguments, keywords):
        arrays = {name: value for name, value in keywords.items() if isinstance(value, np.ndarray)}
        static = {name: value for name, value in keywords.items() if name not in arrays}

        def call(state, others, named):
            return function(state, *others, **named, **static)

        with _mosaic_interpreter() if interpret else contextlib.nullcontext():
            state, *others = (jnp.array(value) for value in arguments)
            named = {name: jnp.array(value) for name, value in arrays.items()}
            result = jax.jit(call, donate_argnums=0)(state, others, named)
            y, state = jax.block_until_ready(result)
        return np.asarray(y), np.asarray(state)

    return run


@contextlib.contextmanager
def _mosaic_interpreter():
    from .interpret_mosaic import interpreted

    with interpreted():
        yield


def twins(op: str, interpret: bool) -> dict[str, Runner]:
    """The implementations of `op` that the packages have, by name."""
    import functools

    import pallas_ssm
    import triton_ssm

    pallas = getattr(pallas_ssm, op)
    return {
        "triton": torch_runner(getattr(triton_ssm, op), interpret),
        "mosaic_gpu": jax_runner(functools.partial(pallas, implementation="mosaic_gpu"), interpret),
        "xla": jax_runner(functools.partial(pallas, implementation="xla"), interpret=False),
    }


def device(interpret: bool) -> Any:
    """The device whose tables serve this run."""
    import torch

    from triton_ssm._device import tuning_device

    return tuning_device(torch.device("cpu" if interpret else "cuda"))
