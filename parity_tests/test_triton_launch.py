"""Calls that repeat an earlier one hand CUDA what Triton's own launch path would."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from triton import knobs

import ssm_configs
import triton_ssm
from ssm_configs.contracts import causal_conv1d as contract
from triton_ssm import _arguments, _native, _recording, _replay

from . import graphs, stub_driver


@pytest.mark.timeout(300)
def test_launches_of_a_stubbed_driver():
    """In a process of its own: there the compiler is Triton's, here its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W",
         "ignore::ssm_configs.TableWarning", "parity_tests/stubbed_launches.py", "parity_tests/stubbed_kinds.py"],
        capture_output=True, text=True, env=environment, cwd=os.path.dirname(os.path.dirname(__file__)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_on_the_cpu_nothing_is_replayed():
    """The interpreter looks into tensors, so every call is its own."""
    assert _replay.SERVED == ("cuda",)
    x, weight = torch.ones(1, 4, 2), torch.ones(2, 2)
    for value in (1.0, 2.0, 3.0, 4.0):
        y, final = triton_ssm.causal_conv1d(x.fill_(value), weight)
        assert torch.equal(y[0, :, 0], torch.tensor([1.0, 2, 2, 2]) * value) and torch.equal(final[0, 0], x[0, -1])


def _results(result: Any) -> list[torch.Tensor]:
    return (
        [tensor for part in result for tensor in _results(part)]
        if isinstance(result, tuple)
        else [result][: result is not None]
    )


def _same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, wanted, strict=True))


class _Counted:
    def __init__(self, native: Any, replays: list) -> None:
        self._native, self._replays = native, replays

    def attempt(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        result = self._native.attempt(args, kwargs)
        if result is not NotImplemented:
            self._replays.append(args)
        return result


@pytest.mark.gpu
@pytest.mark.parametrize("native", [True, False])
def test_replays_give_the_same_bits(native: bool, monkeypatch: pytest.MonkeyPatch):
    """From C and from Python."""
    assert _native.native() is not None
    ssm_configs.clear_cache()
    calls = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.device("cuda"):
            calls.append(stub_driver.calls())
    replays: list[Any] = []
    if native:
        made = _native.replay
        monkeypatch.setattr(_native, "replay", lambda **parts: _Counted(made(**parts), replays))
    else:
        replay = _recording.Program._run
        monkeypatch.setattr(_recording, "issue", lambda launches, place_of: None)
        monkeypatch.setattr(_recording.Program, "_run", lambda *args: replays.append(args) or replay(*args))
    for name in calls[0]:
        replays.clear()
        _check_replays(name, [drawn[name] for drawn in calls], replays, monkeypatch)


def _check_replays(name: str, calls: list[Callable[[], Any]], replays: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other addresses, on another stream and in a CUDA graph; states that are updated in place are among the results."""
    given = [stub_driver.tensors_of(call) for call in calls]
    before = [[tensor.clone() for tensor in tensors] for tensors in given]

    def restore(turn: int, values: list[torch.Tensor]) -> None:
        for tensor, value in zip(given[turn], values, strict=True):
            tensor.copy_(value)

    def run(turn: int) -> list[torch.Tensor]:
        restore(turn, before[turn])
        return [tensor.clone() for tensor in (*_results(calls[turn]()), *given[turn])]

    with monkeypatch.context() as patch:
        patch.setattr(_replay, "_is_watched", lambda: True)
        wanted = [run(turn) for turn in (0, 1)]
    assert not replays
    assert all(_same(run(turn), wanted[turn]) for turn in (0, 0, 0, 1, 0, 1)), name
    assert len(replays) == 4, name
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert _same(run(0), wanted[0]), name
    torch.cuda.synchronize()

    with graphs.capture() as graph:
        result = calls[0]()
    assert len(replays) == 6, name
    restore(0, before[1])
    graph.replay()
    assert _same([*_results(result), *given[0]], wanted[1]), name


def test_what_only_stands_for_tensors_is_refused():
    """Its address is 0. Also where a tensor like it was taken before."""

    class Sharded(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    x, weight = torch.ones(1, 4, 2), torch.ones(2, 2)
    triton_ssm.causal_conv1d(x, weight)
    sharded = torch.Tensor._make_wrapper_subclass(Sharded, weight.shape, dtype=weight.dtype)  # type: ignore[attr-defined]
    with pytest.raises(
        TypeError, match=r"^weight: expected a strided torch.Tensor with memory of its own, got Sharded"
    ):
        triton_ssm.causal_conv1d(x, sharded)


def test_nothing_does_not_overlap():
    """A tensor without elements may have strides of 0: NumPy's have."""
    _arguments.check_apart("out", torch.empty(0).as_strided((0, 3, 2), (0, 0, 0)))
    _arguments.check_apart("out", torch.empty(24).as_strided((2, 3, 2), (2, 4, 1)))
    with pytest.raises(ValueError, match=r"^out: expected elements that do not overlap, got strides \(2, 3, 1\)"):
        _arguments.check_apart("out", torch.empty(24).as_strided((2, 3, 2), (2, 3, 1)))


def test_a_device_without_a_kernel_is_named_with_its_argument():
    x, weight = torch.ones(1, 4, 2, device="meta"), torch.ones(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"^x: expected a GPU tensor .* got device meta"):
        triton_ssm.causal_conv1d(x, weight)
    with pytest.raises(ValueError, match=r"^g: expected a GPU tensor .* got device meta"):
        triton_ssm.gdn.chunk_local_cumsum(x)


def test_torch_compile_calls_operators_as_they_are():
    """Traced, they would be broken into dozens of graphs, and the interpreter would not survive it."""
    x, weight = torch.randn(1, 4, 2), torch.randn(2, 2)
    compiled = torch.compile(lambda x: triton_ssm.causal_conv1d(x + 1, weight)[0] * 2, backend="eager")
    assert torch.equal(compiled(x), triton_ssm.causal_conv1d(x + 1, weight)[0] * 2)


def test_compiles_are_forbidden_until_the_last_one_has_left():
    """Threads leave in any order."""
    before = knobs.runtime.jit_cache_hook
    with ExitStack() as second:
        with triton_ssm.forbid_compiles():
            second.enter_context(triton_ssm.forbid_compiles())
        assert knobs.runtime.jit_cache_hook is not before
    assert knobs.runtime.jit_cache_hook is before


@pytest.mark.parametrize("missing", [*contract.PREFILL[:2], *contract.UPDATE[:3]])
def test_a_required_tensor_that_is_none_is_named(missing: str):
    tensors = {"x": torch.ones(1, 2), "weight": torch.ones(2, 2), "conv_state": torch.ones(1, 1, 2)}
    with pytest.raises(TypeError, match=f"^{missing}: expected a torch.Tensor, got NoneType"):
        triton_ssm.causal_conv1d_update(**tensors | {missing: None})  # type: ignore[arg-type]
    if missing != "conv_state":
        with pytest.raises(TypeError, match=f"^{missing}: expected a torch.Tensor, got NoneType"):
            triton_ssm.causal_conv1d(**{"x": torch.ones(1, 1, 2), "weight": tensors["weight"]} | {missing: None})  # type: ignore[arg-type]
