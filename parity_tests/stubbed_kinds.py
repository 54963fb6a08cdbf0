"""Which calls are replayed, and which must not be. `test_triton_launch.py` runs it in its own process."""

from typing import Any

import pytest
import torch
from triton import knobs

import ssm_configs
import triton_ssm
from triton_ssm import _replay, ssd

from . import stub_checks
from .stub_checks import FUNCTION, bf16, check_replayed, launches, replays, update


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_checks.forget(monkeypatch)


def test_a_parameter_of_any_class_and_what_only_stands_for_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Weight(torch.nn.Parameter):
        pass

    x, data = torch.randn(1, 8, 16, dtype=bf16), torch.randn(16, 4, dtype=bf16)
    for weight in (torch.nn.Parameter(data, requires_grad=False), Weight(data.clone(), requires_grad=False)):
        check_replayed(lambda: triton_ssm.causal_conv1d(x, weight), [x, weight])  # noqa: B023
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(data)
    assert not _replay._is_memory(fake)


def test_another_alignment_is_another_kind():
    """Triton compiles a pointer's divisibility by 16 in."""
    wide = torch.randn(4 * 2 * 16 + 8, dtype=bf16)
    aligned, shifted = (wide[start:][: 4 * 2 * 16].view(4, 2, 16) for start in (0, 1))
    options = {"A": -torch.ones(2), "state": torch.randn(8, 2, 16, 16)}
    functions = set()
    for x in (aligned, shifted, aligned):
        call = update(x=x, **options)
        found = [launches(call) for _ in range(3)]
        assert replays(found[2])
        (function,) = {launch[FUNCTION] for launch, *_ in found}
        functions.add((x.data_ptr() % 16, function))
    assert len(functions) == 2
    assert not replays(launches(update(x=wide[2:][: 4 * 2 * 16].view(4, 2, 16), **options)))


def test_an_override_a_variable_and_a_table_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path):
    call = update()
    grids = {launch[:3] for launch in check_replayed(call, [])}
    with triton_ssm.override("selective_state_update", BLOCK_SIZE_M=8, num_warps=1):
        pinned = {launch[:3] for launch in check_replayed(call, [])}
    assert pinned == {(16, 1, 1)} != grids
    assert {launch[:3] for launch in launches(call)} == grids
    assert replays(launches(call))
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(tmp_path))
    assert not replays(launches(call))
    monkeypatch.delenv("SSM_TUNED_CONFIG_FOLDER")
    assert replays(launches(call))
    monkeypatch.setenv("FLA_USE_TMA", "1")
    assert not replays(launches(call))
    monkeypatch.delenv("FLA_USE_TMA")
    ssm_configs.clear_cache()
    assert not replays(launches(call))


def test_hooks_see_every_launch():
    call, seen = update(), []
    check_replayed(call, [])
    hook: Any = seen.append
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        try:
            assert not replays(launches(call))
        finally:
            chain.remove(hook)
        assert replays(launches(call))


def test_errors_come_as_ever():
    x, dt = torch.randn(4, 2, 16, dtype=bf16), torch.randn(4, 2, dtype=bf16)
    call = {"x": x, "dt": dt, "dt_softplus": True}
    check_replayed(update(**call), [])
    for wrong in (
        {"dt_softplus": 1}, {"null_slot": True}, {"dt": dt[:3]}, {"x": x[:, :, :8]}, {"dt": dt.int()}, {"x": None},
        {"out": torch.empty(4, 2, 8)}, {"dt": [1]}, {"null_slot": {}},
    ):  # fmt: skip
        for _ in range(3):
            with pytest.raises((TypeError, ValueError)):
                update(**call | wrong)()
    asking = dt.clone().requires_grad_()
    with torch.no_grad():
        check_replayed(update(**call | {"dt": asking}), [])
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no backward"):
            update(**call | {"dt": asking})()
    assert replays(launches(update(**call)))


def test_options_are_told_apart_by_type_and_by_what_a_list_holds():
    x, weight = torch.randn(1, 8, 64, dtype=bf16), torch.randn(64, 4, dtype=bf16)
    sizes = [32, 32]

    def call() -> Any:
        return triton_ssm.causal_conv1d_split(x, weight, sizes)

    check_replayed(call, [])
    sizes[:] = [16, 48]
    parts, _ = call()
    assert [part.shape[2] for part in parts] == [16, 48]
    sizes[0] = True
    with pytest.raises((TypeError, ValueError)):
        call()


def test_what_torch_computes_is_computed_anew():
    """A copy of a tensor that is not dense, and a seed: their launches are torch's."""
    x = torch.randn(4, 2, 32, dtype=bf16)[:, :, ::2]
    for call in (update(x=x), update(state=torch.randn(8, 2, 16, 16, dtype=bf16), rounding_seed=3)):
        assert not any(replays(launches(call)) for _ in range(5))


def test_what_torch_writes_is_written_anew():
    x = torch.zeros(8)

    def zeroed(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(3).zero_()

    def counted(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x

    def elsewhere(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ssd.chunk_cumsum(x[4:].view(1, 4, 1), y[:1], chunk_size=16)  # reads what y may be a view of, or not
        return y

    for operator, given in ((zeroed, (x,)), (counted, (x,)), (elsewhere, (x, x[4:]))):
        calls: list[Any] = []

        def observed(*values: Any, operator: Any = operator, calls: list = calls) -> Any:
            calls.append(values)
            return operator(*values)

        replayed = _replay.replayed(observed)
        for _ in range(4):
            replayed(*given)
        assert len(calls) == 4, operator.__name__
    assert x[0] == 4


def test_modes_and_recordings_are_not_replayed_into():
    """Whoever watches allocations sees them; a call within a recorded call is part of the recording."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    call, seen = update(), []
    check_replayed(call, [])
    with Watch():
        assert not replays(launches(call))
    assert torch.ops.aten.empty.memory_format in seen

    inner = update(dt_bias=torch.zeros(2))
    check_replayed(inner, [])
    outer = _replay.replayed(lambda x: inner())
    x = torch.randn(1)
    assert [len(launches(lambda: outer(x))) for _ in range(3)] == [1, 1, 1]


def test_after_warm_up_only_what_is_new_is_refused():
    call = update()
    check_replayed(call, [])
    with triton_ssm.forbid_compiles():
        assert replays(launches(call))
        with pytest.raises(Exception, match="selective_state_update_kernel"):
            update(x=torch.randn(4, 2, 16))()


@pytest.mark.parametrize("change", ["shape of one row", "stride of one row", "rank"])
def test_the_quick_comparison_is_no_less_strict(change: str):
    """Torch's guards, which answer before the full key is looked up, see strides of single rows and ranks as well."""
    base = torch.randn(1, 4)
    other = {
        "shape of one row": torch.randn(1, 5), "stride of one row": base.as_strided((1, 4), (9, 1)), "rank": torch.randn(4),
    }[change]  # fmt: skip
    seen: list[tuple] = []

    @_replay.replayed
    def operator(x: torch.Tensor) -> None:
        seen.append((x.shape, x.stride()))

    for _ in range(4):
        operator(base)
    assert len(seen) == 2
    operator(other)
    assert seen[2:] == [(other.shape, other.stride())]
