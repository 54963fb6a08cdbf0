"""What the SSD operators of `triton_ssm` launch: which sizes a compile is for, which config, and no argument for nothing."""

import ast
import importlib
import inspect
import textwrap
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl

import triton_ssm
from ssm_configs import Device, override
from triton_ssm.ssd import (
    _bmm_chunk_kernel,
    _chunk_cumsum_kernel,
    _chunk_scan_kernel,
    _chunk_state_kernel,
    _chunks,
    _plan,
    _state_passing_kernel,
)

OP = "mamba_chunk_scan_combined"
STAGES = ("chunk_cumsum", "chunk_state", "state_passing", "bmm_chunk", "chunk_scan")
KERNELS = {
    "chunk_cumsum": _chunk_cumsum_kernel.chunk_cumsum_kernel,
    "chunk_state": _chunk_state_kernel.chunk_state_kernel,
    "state_passing": _state_passing_kernel.state_passing_kernel,
    "bmm_chunk": _bmm_chunk_kernel.bmm_chunk_kernel,
    "chunk_scan": _chunk_scan_kernel.chunk_scan_kernel,
}
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """By stage, the arguments by name of every launch from now on, with "key", "grid" and "num_warps"."""
    seen: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for stage, kernel in KERNELS.items():

        def launch(key, grid, arguments, constants, num_warps, *, stage=stage, kernel=kernel):
            named = dict(zip(kernel.arg_names, (*arguments, *constants), strict=True))
            seen[stage].append({"key": key, "grid": grid, "num_warps": num_warps, **named})

        monkeypatch.setattr(importlib.import_module(f"triton_ssm.ssd.{stage}"), "_LAUNCH", launch)
    return seen


def call(T: int = 40, lengths: list[int] | None = None, **options: Any) -> None:
    """A call of the five stages; B, x and C are views of one projection."""
    wide = torch.randn(1, T, 200, dtype=torch.bfloat16)
    x = wide[:, :, :64].unflatten(2, (4, 16))
    B, C = (wide[:, :, start : start + 32].unflatten(2, (2, 16)) for start in (64, 96))
    dt, A = wide[:, :, 128:132], -torch.ones(4)
    if lengths is not None:
        options["cu_seqlens"] = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    with override(OP, FUSED=False):
        triton_ssm.mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=16, dt_softplus=True, **options)


def variant(stage: str, launch: dict[str, Any]) -> tuple:
    """All that Triton compiles for: constants, dtypes, which tensors there are, and of integers whether they are 1 or
    multiples of 16, unless it is told not to look."""
    function = KERNELS[stage].fn
    (decorator,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].decorator_list  # type: ignore[attr-defined]
    (unspecialised,) = (keyword.value for keyword in decorator.keywords if keyword.arg == "do_not_specialize")
    free = ast.literal_eval(unspecialised)
    assert set(free) <= set(KERNELS[stage].arg_names)
    parameters = inspect.signature(function).parameters

    def known_by(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype
        if name not in parameters or parameters[name].annotation is tl.constexpr or value is None:
            return value
        return (value == 1, value % 16 == 0) if isinstance(value, int) else float

    return tuple((name, known_by(name, value)) for name, value in launch.items() if name not in (*free, "key", "grid"))


def test_any_length_and_any_packing_is_one_variant_of_every_kernel(launches):
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(0, 60, rng.integers(1, 9)).tolist()
        call(sum(lengths) + int(rng.integers(0, 20)), lengths, initial_states=torch.zeros(len(lengths), 4, 16, 16))
    for stage in STAGES:
        assert len(launches[stage]) >= 45, "some calls have no tokens"
        assert len({variant(stage, launch) for launch in launches[stage]}) == 1, stage
    launches.clear()
    for T in range(2, 202, 4):  # one token of a wider row has whatever stride torch gives it
        call(T, return_final_states=True)
    for stage in STAGES:
        assert len({variant(stage, launch) for launch in launches[stage]}) == 1, stage


def test_one_kind_of_call_with_other_results_is_remembered_apart(launches):
    """The key of a remembered launch must tell the states' dtypes, and which of them there are."""
    options: dict[str, Any]
    for options in (
        {}, {"state_dtype": torch.float16, "return_final_states": True}, {"return_final_states": True},
        {"return_intermediate_states": True}, {"return_intermediate_states": True, "state_dtype": torch.float16},
        {"return_intermediate_states": True, "return_final_states": True},
    ):  # fmt: skip
        call(**options)
    assert len({launch["key"] for launch in launches["state_passing"]}) == 6
    assert len({launch["key"] for launch in launches["chunk_scan"]}) == 1


def test_a_chunk_is_not_longer_than_128_tokens_and_ends_where_the_callers_does(launches):
    x, B = torch.zeros(1, 600, 1, 16), torch.zeros(1, 600, 1, 16)
    for chunk_size, L in ((16, 16), (128, 128), (256, 128), (2048, 128)):
        with override(OP, FUSED=False):
            triton_ssm.mamba_chunk_scan_combined(x, x[..., 0], -torch.ones(1), B, B, chunk_size=chunk_size)
        assert launches["chunk_scan"][-1]["L"] == L
        assert launches["state_passing"][-1]["CHUNKS_PER_EXPORT"] == chunk_size // L


def test_every_stage_goes_by_its_own_config_whenever_that_changes(launches):
    call()
    with override("ssd_chunk_scan", BLOCK_SIZE_N=16, num_stages=3), override("ssd_chunk_cumsum", num_warps=8):
        call()
    call()
    assert [launch["STAGES"] for launch in launches["chunk_scan"]] == [1, 3, 1]
    assert [launch["num_warps"] for launch in launches["chunk_cumsum"]] == [1, 8, 1]
    assert len({launch["key"] for launch in launches["chunk_scan"]}) == 1


def test_no_launch_has_more_than_one_grid_axis(launches):
    call(40, [20, 20], initial_states=torch.zeros(2, 4, 16, 16))
    assert all(
        launch["grid"][1:] == (1, 1) and launch["grid"][0] > 0 for found in launches.values() for launch in found
    )


@pytest.mark.parametrize("device, ieee", [("NVIDIA H200", "tf32x3"), ("AMD Instinct MI300X", "ieee")])
def test_products_are_as_precise_as_asked(launches, monkeypatch, device, ieee):
    """Three products of tf32 where there are tensor cores for them, and one word for 16-bit operands whatever is asked."""
    capability = (9, 0) if "NVIDIA" in device else None
    monkeypatch.setattr(_plan, "tuning_device_of", lambda *_: Device(device, capability))
    for dtype, precision, expected in (
        (torch.float32, "ieee", ieee), (torch.float32, "tf32", "tf32"),
        (torch.bfloat16, "ieee", "ieee"), (torch.bfloat16, "tf32", "ieee"),
    ):  # fmt: skip
        # Another size for each device, so that no call is known from the other.
        x = torch.zeros(1, len(device), 1, 16, dtype=dtype)
        with override(OP, FUSED=False):
            triton_ssm.mamba_chunk_scan_combined(x, x[..., 0], -torch.ones(1), x, x, chunk_size=16, precision=precision)
        for stage in ("chunk_state", "bmm_chunk", "chunk_scan"):
            assert launches[stage][-1]["PRECISION"] == expected


@pytest.mark.parametrize(
    "module",
    [
        _bmm_chunk_kernel, _chunk_cumsum_kernel, _chunk_scan_kernel, _chunk_state_kernel, _chunks, _state_passing_kernel,
    ],
)  # fmt: skip
def test_every_argument_a_kernel_takes_is_read(module):
    for name, function in inspect.getmembers(module, lambda member: hasattr(member, "fn")):
        source = textwrap.dedent(inspect.getsource(function.fn))
        (definition,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
        read = {
            node.id for node in ast.walk(definition) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        unread = {argument.arg for argument in definition.args.args} - read
        assert not unread, f"{name} never reads {sorted(unread)}"
