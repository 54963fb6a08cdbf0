"""What the C launchers are handed, by Triton's own way and by a replay. `test_triton_launch.py` runs it in its own process."""

import contextlib
import functools
import gc
import struct
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import triton_ssm
from triton_ssm import _c_launch, _native, _recording

from . import stub_checks, stub_driver
from .stub_checks import DRIVER, bf16, check_replayed, from_c, launches, replays, update, written

CALLS = stub_driver.calls()


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_checks.forget(monkeypatch)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", list(CALLS))
def test_a_replay_hands_over_what_triton_does(name: str, native: bool, monkeypatch: pytest.MonkeyPatch):
    """From C and from Python. Plain kernels, and Gluon's with their tensor maps."""
    monkeypatch.setattr(DRIVER, "native", native)
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
    by_a_view = update(state_batch_indices=slots, dst_state_batch_indices=slots.view(4))
    assert from_c(by_a_view) == 0 and replays(launches(by_a_view))
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
    now, _ = _recording._device_functions(torch.device("cuda", 1))
    assert now() == 0
    current = 1
    assert now() == 1

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
    monkeypatch.setattr(_recording, "_device_functions", lambda device: (lambda: 3, new))
    monkeypatch.setattr(DRIVER, "native", False)
    call = update()
    check_replayed(call, [])
    assert entered == [torch.device("cpu"), None] * 3


def test_another_convention_of_the_launcher_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_c_launch.nvidia, "_BASE_ARGS_FORMAT", "iiiKKppOOOOO")
    call = update(dt_softplus=True)
    assert not any(replays(launches(call)) for _ in range(4))


def test_from_c_on_the_recorded_device_alone(monkeypatch: pytest.MonkeyPatch):
    current = None
    functions = _recording._device_functions
    monkeypatch.setattr(_recording, "_device_functions", lambda device: (lambda: current, functions(device)[1]))
    call = update()
    check_replayed(call, [])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    current = 1
    assert from_c(call) == 0 and replays(launches(call))
    current = None
    assert from_c(call) == 1


def test_a_thread_without_a_context_is_left_to_triton(monkeypatch: pytest.MonkeyPatch):
    call = update()
    check_replayed(call, [])
    monkeypatch.setattr(DRIVER.cuda, "context", None)
    assert from_c(call) == 0 and replays(launches(call))


def test_an_error_of_the_driver_is_raised(monkeypatch: pytest.MonkeyPatch):
    call = CALLS["mamba_chunk_scan_combined, in pieces"]
    check_replayed(call, [])
    monkeypatch.setattr(DRIVER.cuda, "code", 1)
    before = DRIVER.cuda.launched
    with pytest.raises(RuntimeError, match=r"Triton Error \[CUDA\]: stubbed"):
        call()
    assert DRIVER.cuda.launched == before + 1
    monkeypatch.undo()
    assert from_c(call) == 3


def test_scratch_is_given_back(monkeypatch: pytest.MonkeyPatch):
    """On a GPU it is no tensor. After a launch that fails, too, whose error is the one that is raised."""
    taken: dict[int, tuple[int, int]] = {}
    seen, room = [], True

    def take(size: int, stream: int) -> int:
        if not room:
            raise MemoryError(f"{size} on {stream:#x}")
        address = (0x7 << 40) + (len(seen) << 30)
        seen.append(address)
        taken[address] = size, stream
        return address

    def give(address: int) -> None:
        del taken[address]
        if DRIVER.cuda.code == 2:
            raise ValueError("given")

    monkeypatch.setattr(_recording, "_raw_memory", lambda device: (take, give))
    call = CALLS["mamba_chunk_scan_combined, in pieces"]
    given = stub_driver.tensors_of(call)
    first, *_, last = (launches(call) for _ in range(4))
    assert written(first, given) == written(last, given)
    assert len(seen) == 2 and not taken
    reached = {
        part for launch in last for part in launch if type(part) is int and seen[1] <= part < seen[1] + (1 << 30)
    }
    assert seen[1] in reached and len(reached) == 3
    for code in (1, 2):
        monkeypatch.setattr(DRIVER.cuda, "code", code)
        with pytest.raises(RuntimeError, match="stubbed"):
            call()
        assert len(seen) == 2 + code and not taken
    monkeypatch.setattr(DRIVER.cuda, "code", 0)

    room = False
    with pytest.raises(MemoryError, match="0x57"):
        call()
    assert len(seen) == 4 and not taken


def test_parameters_that_the_driver_has_otherwise(monkeypatch: pytest.MonkeyPatch):
    """Another Triton may append other ones."""
    sizes = DRIVER.cuda.sizes
    monkeypatch.setattr(DRIVER.cuda, "sizes", lambda function: sizes(function)[:-1])
    call = update()
    found = [launches(call) for _ in range(3)]
    assert replays(found[2]) and from_c(call) == 0


def test_kinds_that_take_turns():
    calls = [
        update(x=torch.randn(4, 2, width, dtype=bf16), state=torch.randn(8, 2, width, 16)) for width in (16, 32, 64)
    ]
    for call in calls:
        check_replayed(call, [])
    assert [from_c(call) for _ in range(2) for call in calls] == [1] * 6


def test_no_reference_is_lost_or_kept():
    """Of what a call is given and makes; over a thousand calls, of which some are of another kind."""
    x, weight, sizes = torch.randn(1, 8, 64, dtype=bf16), torch.randn(64, 4, dtype=bf16), [32, 32]
    other, bias = torch.randn(1, 9, 64, dtype=bf16), torch.randn(64, dtype=bf16)

    def call() -> None:
        triton_ssm.causal_conv1d_split(x, weight, sizes, bias=bias)

    def of_another_kind() -> None:
        triton_ssm.causal_conv1d_split(other, weight, sizes, bias=bias)

    check_replayed(call, [])
    check_replayed(of_another_kind, [])
    held = (x, weight, sizes, other, bias, torch.bfloat16, x.data_ptr, None)
    counts = [sys.getrefcount(one) for one in held[:-2]]
    blocks = sys.getallocatedblocks()
    for _ in range(500):
        call()
        of_another_kind()
    assert [abs(sys.getrefcount(one) - count) < 100 for one, count in zip(held, counts, strict=False)] == [True] * 6
    assert sys.getallocatedblocks() - blocks < 500


def _builds(monkeypatch: pytest.MonkeyPatch, build: Callable[[], Any]) -> None:
    monkeypatch.setattr(_native, "native", functools.cache(build))
    monkeypatch.setattr(_native, "_building", None)


def test_nobody_waits_for_the_compiler(monkeypatch: pytest.MonkeyPatch):
    """Until the module is there, calls go Triton's way; they are not recorded for Python, which would stay so."""
    module, built = _native.native(), threading.Event()
    _builds(monkeypatch, lambda: built.wait(60) and module)
    call = update()
    assert not any(replays(launches(call)) for _ in range(4))
    built.set()
    assert _native._building is not None
    _native._building.join()
    assert not replays(launches(call)) and from_c(call) == 1


def test_without_a_compiler_python_replays(monkeypatch: pytest.MonkeyPatch):
    build: Any = _native.native

    def refuse(**source: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(_native, "compile_module_from_src", refuse)
    _builds(monkeypatch, build.__wrapped__)
    assert _native.native() is None
    call = update()
    found = [launches(call) for _ in range(3)]
    assert replays(found[2]) and from_c(call) == 0


def test_what_does_not_fit_is_refused_when_it_is_recorded(monkeypatch: pytest.MonkeyPatch):
    states, module = [], _native.native()

    class Spy:
        @staticmethod
        def Replay(state: tuple) -> Any:
            states.append(state)
            return module.Replay(state)

    _builds(monkeypatch, lambda: Spy)
    assert _native.native() is Spy
    check_replayed(CALLS["mamba_chunk_scan_combined"], [])
    (state,) = states
    callables_and_the_like = (7, 9, 11, 13, 14, 22, 23, 24, 25)
    free = (4, 5, 6, 12, 17, 21)  # bits, places, offsets, parameters and addresses, which may be any
    for entry, part in enumerate(state):
        wrong: list[Any] = [state[:entry]]
        if entry not in callables_and_the_like:
            wrong += [(*state[:entry], bad, *state[entry + 1 :]) for bad in (1.5, "x")]
        if isinstance(part, bytes) and part:
            wrong.append((*state[:entry], struct.pack("q", -1) * (len(part) // 8), *state[entry + 1 :]))
        for other in wrong if entry not in free else wrong[:3]:
            with pytest.raises((TypeError, ValueError)):
                module.Replay(other)
