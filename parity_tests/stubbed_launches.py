"""What the C launchers are handed, by Triton's own way and by a replay. `test_triton_launch.py` runs it in its own process."""

import gc
import weakref
from typing import Any

import pytest
import torch

import triton_ssm
from triton_ssm import _c_launch, _recording

from . import stub_checks, stub_driver
from .stub_checks import DRIVER, bf16, check_replayed, launches, replays, update, written

CALLS = stub_driver.calls()


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_checks.forget(monkeypatch)


@pytest.mark.parametrize("name", list(CALLS))
def test_a_replay_hands_over_what_triton_does(name: str):
    """Plain kernels, and Gluon's with their tensor maps."""
    call = CALLS[name]
    given = stub_driver.tensors_of(call)
    assert given
    check_replayed(call, given)


def test_other_tensors_of_one_kind():
    x, weight = torch.randn(1, 8, 16, dtype=bf16), torch.randn(16, 4, dtype=bf16)
    for turn in range(4):
        x, weight = torch.randn_like(x), torch.randn_like(weight)
        found = launches(lambda: triton_ssm.causal_conv1d(x, weight))  # noqa: B023
        assert replays(found) == (turn > 1)
        handed = [part.data_ptr() if isinstance(part, torch.Tensor) else part for part in found[0]]
        assert handed.count(x.data_ptr()) == handed.count(weight.data_ptr()) == 1


def test_scratch_is_apart_and_aligned():
    made = [torch.empty(3, 5), torch.empty(70_000, dtype=torch.uint8), torch.empty_strided((2, 8), (16, 1), dtype=bf16)]
    offsets, size = _recording._laid_out(made)
    extents = [60, 70_000, 48]
    assert all(offset % 512 == 0 for offset in offsets)
    ends = [offset + extent for offset, extent in zip(offsets, extents, strict=True)]
    assert all(end <= begin for end, begin in zip(ends, [*offsets[1:], size], strict=True))


def test_tensors_that_coincide():
    """Slots to read and to write may be one tensor or two, which only their addresses tell."""
    slots, other = (torch.arange(4, dtype=torch.int32) for _ in range(2))
    together = update(state_batch_indices=slots, dst_state_batch_indices=slots)
    check_replayed(together, [slots])
    apart = {"state_batch_indices": slots, "dst_state_batch_indices": other}
    call = update(**apart)
    found = check_replayed(call, [slots, other])
    assert {"given 0", "given 1"} <= set(written(found, [slots, other])[0])
    assert {"given 0", "given 1"} <= set(written(launches(call), [slots, other])[0])
    assert replays(launches(together)) and set(written(launches(together), [slots])[0]) >= {"given 0"}


def test_results_are_what_they_were():
    x, weight, pool = (
        torch.randn(1, 8, 16, dtype=bf16),
        torch.randn(16, 4, dtype=bf16),
        torch.randn(4, 3, 16, dtype=bf16),
    )
    slots: dict[str, Any] = {
        "state_indices": torch.tensor([1], dtype=torch.int32),
        "has_initial_state": torch.tensor([True]),
    }
    out = torch.empty(1, 8, 16, dtype=bf16)
    for turn in range(4):
        y, final = triton_ssm.causal_conv1d(x, weight, conv_state=pool, out=out, **slots)
        assert y is out and final is pool, turn
    X, dt, A, B = torch.randn(1, 8, 2, 16), torch.randn(1, 8, 2), -torch.ones(2), torch.randn(1, 8, 1, 16)
    C = torch.randn_like(B)
    kept = []
    for _ in range(4):
        y, final = triton_ssm.mamba_chunk_scan_combined(X, dt, A, B, C, chunk_size=16)
        assert (y.shape, y.stride(), y.dtype, y.is_contiguous(), final) == (X.shape, X.stride(), X.dtype, True, None)
        y, final = triton_ssm.mamba_chunk_scan_combined(
            X, dt, A, B, C, chunk_size=16, return_final_states=True, state_dtype=torch.float16
        )
        assert (final.shape, final.dtype) == ((1, 2, 16, 16), torch.float16)
        kept += [y, final]
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept}) == len(kept)


def test_nothing_is_kept_alive():
    given: dict[str, Any] = {
        "x": torch.randn(1, 128, 8, 64, dtype=bf16),
        "dt": torch.randn(1, 128, 8, dtype=bf16),
        "A": -torch.rand(8),
    }
    given |= {name: torch.randn(1, 128, 1, 128, dtype=bf16) for name in "BC"}
    for _ in range(3):
        y, _ = triton_ssm.mamba_chunk_scan_combined(**given, chunk_size=128)
    seen = [weakref.ref(tensor) for tensor in (y, *given.values())]
    del y, given, _
    gc.collect()
    assert not any(reference() is not None for reference in seen)


def test_maps_are_made_once_for_an_address():
    call = CALLS["mamba_chunk_scan_combined"]
    kept = [call() for _ in range(3)]
    before = DRIVER.utils.filled
    kept.append(call())
    assert DRIVER.utils.filled - before <= 3, "one of its new y, two of its scratch; five of what was given"
    del kept

    class Descriptor:
        shape, strides, padding = [64, 64], [64, 1], "nan"

    maps = _c_launch.TensorMaps(Descriptor(), {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [64, 64]})
    for address in range(0, 16 * 1500, 16):
        assert maps[address].arguments == (address, 3, 2, 9, [64, 64], [64, 64], [64, 1], 1)
        assert maps[address] is maps[address] and len(maps) <= 1024


def test_another_device_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch):
    current = 0
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current, raising=False)
    elsewhere, _ = _recording._device_functions(torch.device("cuda", 1))
    assert elsewhere()
    current = 1
    assert not elsewhere()

    entered: list[Any] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *raised: Any) -> None:
            entered.append(None)

    def new(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(_recording, "_device_functions", lambda device: (lambda: True, new))
    call = update()
    check_replayed(call, [])
    assert entered == [torch.device("cpu"), None] * 2


def test_another_convention_of_the_launcher_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_c_launch.nvidia, "_BASE_ARGS_FORMAT", "iiiKKppOOOOO")
    call = update(dt_softplus=True)
    assert not any(replays(launches(call)) for _ in range(4))
