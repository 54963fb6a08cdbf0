"""Chooses interpreters or GPU for the whole session, before any test module imports a framework.

`pytest -m gpu` compiles for and runs on the GPU; everything else runs in the interpreters on the CPU, also where there is
a GPU, because a process can only do one of the two.
"""

import faulthandler

import pytest

from . import runners


def pytest_configure(config: pytest.Config) -> None:
    expression = config.getoption("markexpr") or ""
    on_gpu = "gpu" in expression.split() and "not gpu" not in expression
    runners.prepare(interpret=not on_gpu)
    if not on_gpu:
        import jax

        from . import interpret_triton  # noqa: F401

        # Code for the CPU runs once and on little: optimising it takes longer than it saves. As a setting of this process, for
        # what other processes compile for GPUs must be what users get.
        jax.config.update("jax_disable_most_optimizations", True)
    # A deadlock in an interpreter ignores signals; the traceback says at least where.
    faulthandler.enable()


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
