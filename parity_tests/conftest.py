"""Chooses interpreters or GPU for the whole session, before any test module imports a framework.

`pytest -m gpu` compiles for and runs on the GPU; everything else runs in the interpreters on the CPU, also where there is
a GPU, because a process can only do one of the two.
"""

import faulthandler
import gc

import pytest

from . import runners


def _cheap_compiles() -> None:
    """Code for the CPU runs once and on little: optimising it takes longer than it saves, and so do XLA's newer emitters, which
    cost half the time of an interpreted kernel. For this process alone: what others compile for GPUs must be what users get.
    """
    import jax
    from jaxlib import xla_client

    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", runners.CHEAP_COMPILES, prepend=" ")
        xla_client.CompileOptions()  # reads them, once and for all


def pytest_configure(config: pytest.Config) -> None:
    expression = config.getoption("markexpr") or ""
    on_gpu = "gpu" in expression.split() and "not gpu" not in expression
    runners.prepare(interpret=not on_gpu)
    if not on_gpu:
        _cheap_compiles()
    # A deadlock in an interpreter ignores signals; the traceback says at least where.
    faulthandler.enable()


def pytest_collection_finish() -> None:
    # What the modules hold stays, and need not be looked through again and again.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _skip_without_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def interpret() -> bool:
    import os

    return os.environ.get("TRITON_INTERPRET") == "1"
