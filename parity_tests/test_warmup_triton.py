"""`triton_ssm.warmup`: after it, whatever a server does launches nothing that would have to be compiled."""

import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend

import ssm_configs
import triton_ssm
from ssm_configs.model_dims import ModelDims
from ssm_configs.models import warming
from triton_ssm import _warmup_jobs
from triton_ssm._plans import Launcher
from triton_ssm._recording import Recorder
from triton_ssm.gdn import _loop

from .configs_env import forget_everything
from .serving import TorchServer, Traffic

pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")

MAMBA = ModelDims(heads=3, groups=1, headdim=16, dstate=16, chunk_size=16, model="mamba")
GDN = ModelDims(key_heads=1, value_heads=3, key_dim=16, value_dim=16, conv_bias=False, model="gdn")
SIZES: dict[str, Any] = {"max_tokens": 80, "max_batch": 5}


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_everything(monkeypatch)
    warming.forget()


def _specialised(name: str, value: Any, kernel: Any) -> Any:
    """What Triton's own binder makes of an argument."""
    if value is None:
        return None
    specialise = name not in (kernel.kwargs.get("do_not_specialize") or ())
    align = name not in (kernel.kwargs.get("do_not_specialize_on_alignment") or ())
    return native_specialize_impl(BaseBackend, value, False, specialise, align)


def _record(monkeypatch: pytest.MonkeyPatch, launch: Callable[..., None]) -> set[tuple]:
    seen: set[tuple] = set()

    def record(self, key, grid, arguments, constants, num_warps):
        kernel = self._kernel
        names = kernel.arg_names[: len(arguments)]
        types = tuple(_specialised(name, value, kernel) for name, value in zip(names, arguments, strict=True))
        seen.add((kernel.fn.__name__, types, tuple(constants), num_warps))
        launch(self, key, grid, arguments, constants, num_warps)

    monkeypatch.setattr(Launcher, "_launch", record)
    return seen


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> set[tuple]:
    """What every launch from now on would be compiled for; the set may be cleared. Nothing is launched: what a kernel would be
    compiled for does not depend on what the ones before it computed."""
    return _record(monkeypatch, lambda *launched: None)


@pytest.fixture
def launched_variants(monkeypatch: pytest.MonkeyPatch) -> set[tuple]:
    """The same, and they are launched."""
    return _record(monkeypatch, Launcher._launch)


def serve(
    dims: ModelDims, steps: int, *, speculative: int = 0, training: bool = True, max_tokens: int = 80, **how: Any
) -> set[str]:
    """The kinds of steps that it took."""
    traffic = Traffic(0, max_prompt=90, max_prefills=3, speculative=speculative, **(SIZES | {"max_tokens": max_tokens}))
    server = TorchServer(dims, traffic, "cpu", **how)
    kinds = set()
    for step in traffic.steps(steps):
        if training or step.kind != "training":
            server.run(step)
            kinds.add(step.kind)
    return kinds


ALL = {"prefill", "decode", "speculative", "training"}


@pytest.mark.parametrize("dims", (MAMBA, GDN), ids=lambda dims: dims.model)
def test_serving_launches_no_new_variant(dims, launched_variants):
    variants = launched_variants
    warmup = triton_ssm.warmup(dims, speculative=2, **SIZES)
    assert warmup.calls and not warmup.cached
    warmed = set(variants)
    variants.clear()
    assert serve(dims, 20, speculative=2) == ALL
    assert variants and variants <= warmed


def test_a_scan_stage_by_stage_and_a_gate(variants):
    dims = ModelDims(
        heads=2, groups=2, headdim=16, dstate=16, chunk_size=16, dtype="float32", state_dtype="bfloat16", gate=True
    )
    triton_ssm.warmup(dims, **SIZES)
    warmed = set(variants)
    variants.clear()
    serve(dims, 6)
    assert {"chunk_scan_kernel", "selective_state_update_kernel"} <= {name for name, *_ in variants}
    assert variants <= warmed


def test_states_as_tensors_and_stochastic_rounding(variants):
    dims = ModelDims(
        heads=2, groups=1, headdim=16, dstate=16, chunk_size=16, key_heads=1, value_heads=2, key_dim=16, value_dim=16,
        state_dtype="bfloat16", gates_in_kernel=False,
    )  # fmt: skip
    sizes: dict[str, Any] = {"max_tokens": 20, "max_batch": 2}
    triton_ssm.warmup(dims, forms=["packed_states", "dense_states"], stochastic_rounding=True, **sizes)
    warmed = set(variants)
    variants.clear()
    x, dt, A = torch.randn(1, 20, 2, 16).bfloat16(), torch.randn(1, 20, 2).bfloat16(), -torch.ones(2)
    B, C = torch.randn(2, 1, 20, 1, 16).bfloat16()
    named: dict[str, Any] = {"D": torch.ones(2).bfloat16(), "dt_bias": torch.ones(2).bfloat16(), "dt_softplus": True}
    states = torch.zeros(3, 2, 16, 16, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 7, 20], dtype=torch.int32)
    for cu_seqlens, n in ((bounds, 2), (None, 1)):
        for initial in (None, states[:n]):
            scan = {"initial_states": initial, "cu_seqlens": cu_seqlens, "return_final_states": True}
            triton_ssm.mamba_chunk_scan_combined(
                x, dt, A, B, C, chunk_size=16, state_dtype=torch.bfloat16, **scan, **named
            )
            g = -torch.rand(1, 20, 2)
            rule = {"initial_state": initial, "cu_seqlens": cu_seqlens, "return_final_state": True}
            triton_ssm.chunk_gated_delta_rule(x[:, :, :1], x[:, :, :1], x, g, g.sigmoid(), use_qk_l2norm=True, **rule)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    token: list[Any] = [tensor[0, :2] for tensor in (x, dt, B, C)]
    token.insert(2, A)
    # One of a row of seeds lies at any multiple of 8 bytes.
    for seed in (3, *torch.arange(2)):
        triton_ssm.selective_state_update(  # pyright: ignore[reportCallIssue]
            states, *token, state_batch_indices=slots, rounding_seed=seed, **named
        )  # fmt: skip
    assert variants <= warmed, variants - warmed


def test_scans_in_one_few_and_many_pieces():
    from triton_ssm import _warmup_jobs as jobs

    config = ssm_configs.lookup(
        "mamba_chunk_scan_combined", twin="triton", device=ssm_configs.Device("NVIDIA H200", (9, 0)), dtype="bfloat16",
        size=64 * 100, nheads=4, headdim=64, dstate=128,
    )  # fmt: skip
    assert config["CHUNKS_PER_PIECE"] < 10  # 4 heads leave room for many pieces
    assert jobs._kinds(config, range(1, 6400 + 1), "packed") == {0, 1, 2}
    assert jobs._kinds(config, range(6400, 6400 + 1), "packed") == {2}
    assert jobs._kinds(config, range(6400, 6400 + 1), "dense") == {0, 1, 2}
    assert jobs._kinds(config, range(1, 64 + 1), "packed") == {0}


@pytest.mark.parametrize("entry", ("plain", "aligned"))
def test_other_ways_of_taking_the_convolution_apart(entry, variants):
    triton_ssm.warmup(MAMBA, entries=[entry], forms=["packed"], **SIZES)
    warmed = set(variants)
    variants.clear()
    assert "prefill" in serve(MAMBA, 5, entry=entry, training=False)
    assert variants and variants <= warmed


def test_slices_of_a_batch(variants):
    ops = ["causal_conv1d", "causal_conv1d_update", "selective_state_update"]
    sizes: dict[str, Any] = {"speculative": 1, "forms": ["packed"], "max_tokens": 40, "max_batch": 5, "ops": ops}
    triton_ssm.warmup(MAMBA, sliced=True, **sizes)
    warmed = set(variants)
    variants.clear()
    serve(MAMBA, 12, sliced=True, speculative=1, training=False, max_tokens=40)
    sliced = {variant for variant in variants if not variant[0].startswith("fused_")}
    assert len({name for name, *_ in sliced}) == 3 and sliced <= warmed
    # The promise costs something: without it, these would be compiled late.
    warming.forget()
    variants.clear()
    triton_ssm.warmup(MAMBA, **sizes)
    assert not sliced <= variants


def test_what_was_left_out_is_missed(variants):
    triton_ssm.warmup(MAMBA, ops=["causal_conv1d_update", "selective_state_update"], forms=["packed"], **SIZES)
    warmed = set(variants)
    variants.clear()
    serve(MAMBA, 8)
    late = {name for name, *_ in variants - warmed}
    assert "causal_conv1d_kernel" in late and "fused_out_kernel" in late
    assert "selective_state_update_kernel" not in late


def test_every_config_of_a_table_is_warmed(variants, tmp_path, monkeypatch):
    sizes = {"headdim": 16, "dstate": 16}
    table = {
        str(3 * batch): {"BLOCK_SIZE_M": rows, "num_warps": 2} for batch, rows in ((1, 1), (2, 4), (5, 16), (9, 8))
    }
    path = tmp_path / "selective_state_update" / "headdim=16,dstate=16,device_name=NVIDIA_H200,cache_dtype=float32.json"
    path.parent.mkdir()
    ssm_configs.write_table(path, table, ssm_configs.SPECS["selective_state_update"], sizes)
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(tmp_path))
    triton_ssm.warmup(MAMBA, ops=["selective_state_update"], **SIZES)
    # BLOCK_SIZE_M is the last constant. 9 is past the largest batch, and no batch up to 5 is nearer to it than to 5.
    assert {constants[-1] for _, _, constants, _ in variants} == {1, 4, 16}


def test_once_per_process_and_config(variants, monkeypatch):
    first = triton_ssm.warmup(GDN, ops=["causal_conv1d_update"], **SIZES)
    variants.clear()
    second = triton_ssm.warmup(GDN, ops=["causal_conv1d_update"], **SIZES)
    assert not variants and second.cached and not first.cached
    assert second.calls == first.calls and "done before" in str(second)
    with ssm_configs.override("causal_conv1d_update", BLOCK_SIZE_D=64):
        third = triton_ssm.warmup(GDN, ops=["causal_conv1d_update"], **SIZES)
    assert variants and not third.cached


def test_without_a_config_nothing_is_warmed_and_that_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert triton_ssm.warmup(None, **SIZES).calls == 0
    assert [record.message for record in caplog.records] == [
        "triton_ssm.warmup: no model config, or one without state-space layers: nothing is warmed up"
    ]


def test_kernels_are_counted_once_and_others_still_listen(monkeypatch):
    from triton import knobs

    from triton_ssm import _warmup_jobs

    heard = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **compiled: heard.append(compiled["cache_hit"]))
    before = knobs.compilation.listener

    def compiled(**named):
        for name, hit in (("a", False), ("b", True), ("a", True)):
            listener: Any = knobs.compilation.listener
            listener(metadata={"hash": name}, cache_hit=hit)

    monkeypatch.setattr(_warmup_jobs, "selective_state_update", compiled)
    summary = triton_ssm.warmup(MAMBA, ops=["selective_state_update"], **SIZES)
    assert (summary.variants, summary.cache_hits) == (2, 1) and heard[:3] == [False, True, True]
    assert knobs.compilation.listener is before


def test_a_recording_brings_no_dynamo_in(monkeypatch: pytest.MonkeyPatch):
    """Torch would have it leave a mode's code alone; to import it takes longer than a warm-up from Triton's cache."""
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # an import would raise
    with Recorder(()):
        assert torch.empty(3).shape == (3,)


def test_few_and_many_sequences_of_the_delta_rule(monkeypatch: pytest.MonkeyPatch):
    """Their number is the only size, beside the config that it picks, which the fused path's variants follow."""
    seen = set()

    def call(*, q: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None = None, **others: Any) -> None:
        N_seq = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
        seen.add((cu_seqlens is not None, N_seq > _loop.most_sequences(*v.shape[2:])))

    monkeypatch.setattr(_warmup_jobs, "chunk_gated_delta_rule", call)
    dims = ModelDims(key_heads=1, value_heads=2, key_dim=128, value_dim=128)
    triton_ssm.warmup(dims, ops=["chunk_gated_delta_rule"], **SIZES)
    assert seen == {(False, False), (False, True), (True, False), (True, True)}


def test_random_state_is_left_alone():
    before = torch.get_rng_state()
    triton_ssm.warmup(GDN, ops=["causal_conv1d_update"], **SIZES)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    (
        ({"max_tokens": 0}, ValueError, "max_tokens: expected at least 1, got 0"),
        ({"max_batch": True}, TypeError, "max_batch: expected an int, got bool"),
        ({"speculative": -1}, ValueError, "speculative: expected at least 0, got -1"),
        ({"ops": ["selective_scan"]}, ValueError, "ops: expected some of .*, got 'selective_scan'"),
        ({"ops": ["chunk_gated_delta_rule"]}, ValueError, "ops: expected some of"),
        ({"forms": ["ragged"]}, ValueError, "forms: expected some of .*, got 'ragged'"),
        ({"forms": "packed"}, TypeError, "forms: expected a sequence of names"),
        ({"threads": 0}, ValueError, "threads: expected at least 1, got 0"),
        ({"sliced": 1}, TypeError, "sliced: expected a bool, got int"),
        ({"entries": ["fused"]}, ValueError, "entries: expected some of"),
        ({"stochastic_rounding": True}, ValueError, "stochastic_rounding: expected a 16-bit state_dtype, got float32"),
        ({"device": "cuda"}, ValueError, "device: expected a GPU that torch can use"),
    ),
)  # fmt: skip
def test_errors(change, error, text, variants):
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(error, match=text):
        triton_ssm.warmup(MAMBA, **(SIZES | change))
    assert not variants


def test_a_failing_call_is_named(monkeypatch):
    from triton_ssm import _warmup_jobs

    def broken(**named):
        raise ZeroDivisionError("no")

    monkeypatch.setattr(_warmup_jobs, "selective_state_update", broken)
    with pytest.raises(RuntimeError, match=r"warmup: selective_state_update, BLOCK_SIZE_M=.*ZeroDivisionError: no"):
        triton_ssm.warmup(MAMBA, ops=["selective_state_update"], **SIZES)


def test_the_readme_of_the_function_names_its_arguments():
    documented = triton_ssm.warmup.__doc__ or ""
    assert all(f"{name}:" in documented for name in inspect.signature(triton_ssm.warmup).parameters)
