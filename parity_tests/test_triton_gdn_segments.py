"""Segments of the fused gated delta rule in `triton_ssm`: what their kernels are given, and the states between them."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

import triton_ssm
from ssm_configs import override
from ssm_configs.contracts.gdn import Dims
from ssm_configs.contracts.gdn_segments import segment_chunks
from ssm_configs.model_dims import ModelDims
from ssm_configs.models import warming
from triton_ssm import _warmup_jobs
from triton_ssm._plans import Launcher
from triton_ssm.gdn import _loop, _segments
from triton_ssm.gdn._between_kernel import gdn_between_kernel

from .compare import error
from .oracle import gdn as oracle
from .runners import to_torch
from .test_triton_gdn import draw
from .test_triton_gdn_combined import unspecialised

OP = "chunk_gated_delta_rule"
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


def dims(**changes: Any) -> Dims:
    given = {"B": 1, "T": 8192, "H_k": 2, "H_v": 8, "K": 128, "V": 128, "L": 64, "NC": 128, "N_seq": 1, "packed": False}
    return Dims(**(given | changes))


def test_which_calls_come_in_segments():
    assert _segments.chunks_of(dims(), 132) == segment_chunks(1, 8, 128, 128, 128) < 128
    assert _segments.chunks_of(dims(packed=True, NC=129), 132) == 129
    assert _segments.chunks_of(dims(H_v=32), 132) == 128
    assert _segments.chunks_of(dims(), 16) == 128


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_the_states_between(dtype, interpret):
    """Of what the oracle says of every segment, though of no tokens' q."""
    if not interpret:
        pytest.skip("runs the interpreter")
    B, H_v, K, V, length, segments = 2, 2, 32, 48, 5, 3
    given = draw((length * segments,), B=B, H_v=H_v, K=K, V=V, initial=True)
    initial = None if dtype is None else to_torch(given["initial_state"], "cpu").to(getattr(torch, dtype))
    start = np.zeros((B, H_v, K, V)) if initial is None else initial.double().numpy()
    ends, expected = np.zeros((B, segments - 1, H_v, K, V + K), np.float32), [start]
    for s in range(segments - 1):
        part = [given[name][:, s * length : (s + 1) * length] for name in ("q", "k", "v", "g", "beta")]
        expected.append(oracle.chunk_gated_delta_rule(*part, initial_state=expected[-1].copy())[1])
        ends[:, s, ..., :V] = oracle.chunk_gated_delta_rule(*part)[1]
        part[2] = np.zeros((B, length, H_v, K))
        one = np.broadcast_to(np.eye(K), (B, H_v, K, K))
        ends[:, s, ..., V:] = oracle.chunk_gated_delta_rule(*part, initial_state=one)[1]
    states = torch.full((B, segments, H_v, K, V), float("nan"))
    kernel: Any = gdn_between_kernel
    kernel[(B * H_v * V // 16,)](torch.from_numpy(ends), initial, states, segments, H_v, K, V, 16, 3)
    for s in range(segments):
        assert error(states[:, s].numpy(), expected[s]).within(1e-6, 1e-6)


@pytest.mark.parametrize("initial", [False, True])
def test_what_the_kernels_of_segments_are_given(monkeypatch, initial):
    """Five chunks of two rows, by two: three segments, of which the last is shorter."""
    launched: dict[str, dict[str, Any]] = {}

    def record(self, key, grid, arguments, constants, num_warps):
        function = self._kernel.fn
        names = inspect.getfullargspec(function).args
        launched[function.__name__] = dict(zip(names, (*arguments, *constants), strict=True)) | {"grid": grid[0]}

    monkeypatch.setattr(_loop, "serves", lambda dims, o: True)
    monkeypatch.setattr(_segments, "segment_chunks", lambda *sizes: 2)
    monkeypatch.setattr(Launcher, "_launch", record)
    T, H_k, H_v, K, V = 300, 1, 2, 64, 128
    given = draw((T,), B=2, H_k=H_k, H_v=H_v, K=K, V=V, dtype="bfloat16", initial=initial)
    tensors = [to_torch(given[name], "cpu") for name in ("q", "k", "v", "g", "beta")]
    state = to_torch(given["initial_state"], "cpu") if initial else None
    with override(OP, FUSED=True):
        _, final = triton_ssm.chunk_gated_delta_rule(*tensors, initial_state=state, return_final_state=True)
    assert final is not None
    names = ["gdn_prepare_kernel", "gdn_ends_kernel_hopper", "gdn_between_kernel", "gdn_loop_kernel_hopper"]
    assert [*launched] == names
    _, ends, between, loop = launched.values()
    parts = V // 64
    assert [each["grid"] for each in (ends, between, loop)] == [2 * 2 * H_v * (parts + 1), 2 * H_v * 8, 6 * H_v * parts]
    assert ends["ends_ptr"] is between["ends_ptr"] and between["states_ptr"] is loop["initial_ptr"]
    assert ends["ends_ptr"].shape == (4, H_v, K, V + K) and loop["initial_ptr"].shape == (6, H_v, K, V)
    assert {ends["ends_ptr"].dtype, loop["initial_ptr"].dtype} == {torch.float32}
    assert between["initial_ptr"] is state and loop["final_ptr"] is final and final.shape == (2, H_v, K, V)
    for name in ("k", "v", "Y", "gates"):
        assert ends[f"{name}_desc"] is loop[f"{name}_desc"]
    for name, value in {"n_tokens": T, "n_chunks": 5, "n_segments": 3, "segment_chunks": 2}.items():
        assert ends[name] == loop[name] == value
    assert between["n_segments"] == 3 and loop["n_sequences"] == 2 and loop["WARPGROUPS"] == 1
    assert all(each["H_V"] == H_v and each["K"] == K and each["V"] == V for each in (ends, between, loop))


@pytest.mark.parametrize(("max_tokens", "cut"), [(8192, True), (2048, False)])
def test_warm_up_comes_to_segments(monkeypatch, max_tokens, cut):
    """Where some call of so many tokens does, with and without states."""
    seen = set()

    def call(*, v: torch.Tensor, cu_seqlens=None, initial_state=None, return_final_state=False, **others: Any) -> None:
        B, T, H_v, V = v.shape
        assert B * T <= max_tokens
        if cu_seqlens is None and segment_chunks(B, H_v, 128, V, -(-T // 64)) < -(-T // 64):
            seen.add((initial_state is not None, return_final_state))

    monkeypatch.setattr(_warmup_jobs, "chunk_gated_delta_rule", call)
    warming.forget()
    model = ModelDims(key_heads=2, value_heads=8, key_dim=128, value_dim=128)
    forms = ["packed", "dense", "dense_states"]
    with override(OP, FUSED=True):
        triton_ssm.warmup(model, ops=[OP], forms=forms, max_tokens=max_tokens, max_batch=2)
    assert seen == ({(False, False), (False, True), (True, True)} if cut else set())
    warming.forget()


def specialised(kernel: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton would compile anew for."""
    skipped, seen = unspecialised(kernel), []
    for name, value in zip(inspect.getfullargspec(kernel.fn).args, arguments, strict=False):
        if isinstance(value, torch.Tensor):
            seen.append((value.dtype, value.data_ptr() % 16))
        elif isinstance(value, int) and name not in skipped:
            seen.append((value == 1, value % 16 == 0))
        elif isinstance(value, TensorDescriptor):
            seen.append((value.base.dtype, tuple(value.block_shape), repr(value.layout)))
        else:
            seen.append(type(value))
    return kernel.fn.__name__, *seen


def test_after_warm_up_no_length_is_a_new_variant(monkeypatch):
    variants: set[Any] = set()

    def record(self, key, grid, arguments, constants, num_warps):
        variants.add((specialised(self._kernel, arguments), constants, num_warps))

    monkeypatch.setattr(_loop, "serves", lambda dims, o: True)
    monkeypatch.setattr(Launcher, "_launch", record)
    warming.forget()
    model = ModelDims(key_heads=1, value_heads=2, key_dim=128, value_dim=128)
    with override(OP, FUSED=True):
        triton_ssm.warmup(model, ops=[OP], forms=["dense", "dense_states"], max_tokens=9000, max_batch=2)
        warming.forget()
        warmed = set(variants)
        variants.clear()
        for B, T in ((1, 9000), (1, 8192), (1, 5000), (2, 4500), (1, 1), (1, 64), (2, 1000)):
            q, k, v = (torch.zeros(B, T, heads, 128, dtype=torch.bfloat16) for heads in (1, 1, 2))
            g = torch.zeros(B, T, 2)
            for state in (None, torch.zeros(B, 2, 128, 128)):
                for wanted in (state is not None, True):
                    triton_ssm.chunk_gated_delta_rule(
                        q, k, v, g, g, initial_state=state, use_qk_l2norm=True, return_final_state=wanted
                    )
    assert {name for (name, *_), *_ in variants} == {
        "gdn_prepare_kernel", "gdn_ends_kernel_hopper", "gdn_between_kernel", "gdn_loop_kernel_hopper"
    }  # fmt: skip
    assert variants <= warmed, variants - warmed
