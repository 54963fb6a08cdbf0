"""Looking at launches in a process with the stubbed driver.

A launch here is (grid X, Y, Z, stream, function, cooperative, PDL, two scratches, kernel's metadata, launch's, two hooks, …).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import ssm_configs

from . import stub_driver

DRIVER = stub_driver.install()

import triton_ssm  # noqa: E402

HOOKS = slice(10, 13)
FUNCTION = 4
bf16 = torch.bfloat16


def from_c(call: Callable[[], Any]) -> int:
    """How many launches C made of a call."""
    before = DRIVER.cuda.launched
    call()
    return DRIVER.cuda.launched - before


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program of an earlier test is for a later one, and no variable of whoever runs them."""
    for name in ("SSM_TUNED_CONFIG_FOLDER", "VLLM_TUNED_CONFIG_FOLDER", "FLA_USE_TMA"):
        monkeypatch.delenv(name, raising=False)
    ssm_configs.clear_cache()


def launches(call: Callable[[], Any]) -> list[tuple]:
    DRIVER.launches = []
    try:
        call()
        return DRIVER.launches
    finally:
        DRIVER.launches = None


def replays(found: list[tuple]) -> bool:
    """Triton hands its chains of hooks over, a replay none."""
    assert found
    (how,) = {all(part is None for part in launch[HOOKS]) for launch in found}
    return how


def written(found: list[tuple], given: list[torch.Tensor]) -> list[list[Any]]:
    """Launches with a name for every address: of a given tensor, or of what was made, by its turn."""
    addresses: dict[int, str] = {tensor.data_ptr(): f"given {index}" for index, tensor in enumerate(given)}

    def name(address: int) -> Any:
        return addresses.setdefault(address, f"made {len(addresses)}")

    def write(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return name(part.data_ptr())
        if isinstance(part, stub_driver.PyCUtensorMap):
            address, *rest = part.arguments
            return (
                name(address),
                *(list(entry) if isinstance(entry, torch.Size | tuple | list) else entry for entry in rest),
            )
        # No integer of a kernel is as large as an address.
        return name(part) if type(part) is int and part >= 2**32 else part

    return [[*map(write, launch[:10]), *map(write, launch[13:])] for launch in found]


def check_replayed(call: Callable[[], Any], given: list[torch.Tensor]) -> list[tuple]:
    """That the third call and later ones hand over what the first one does, from C or not; returns Triton's launches."""
    first, second, third, fourth = (launches(call) for _ in range(4))
    assert from_c(call) == (len(first) if DRIVER.native else 0)
    assert [replays(found) for found in (first, second, third, fourth)] == [False, False, True, True]
    assert written(first, given) == written(third, given) == written(fourth, given)
    return first


def update(**options: Any) -> Callable[[], torch.Tensor]:
    B, H, P, N = 4, 2, 16, 16
    x, dt, B_, C = (torch.randn(B, *shape, dtype=bf16) for shape in ((H, P), (H,), (1, N), (1, N)))
    tensors: dict[str, Any] = {
        "state": torch.randn(8, H, P, N),
        "x": x,
        "dt": dt,
        "A": -torch.ones(H),
        "B": B_,
        "C": C,
    } | options
    return lambda: triton_ssm.selective_state_update(**tensors)
