"""`triton_ssm.chunk_gated_delta_rule` in the interpreter, which runs its stages, against the recurrence in float64."""

import ast
import dataclasses
import inspect
import math
import textwrap
from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_ssm
from ssm_configs import override
from ssm_configs.contracts.gdn import Dims
from triton_ssm._plans import Launcher
from triton_ssm.gdn import _loop, _prepare
from triton_ssm.gdn._loop_kernel import gdn_loop_kernel_hopper
from triton_ssm.gdn._prepare_kernel import gdn_prepare_kernel
from triton_ssm.ssd import _fused_gluon

from .compare import error
from .oracle import gdn as oracle
from .runners import to_torch
from .test_triton_gdn import (
    call,
    draw,
    give,
    poison,
    poisoned,  # noqa: F401
    put,
    resembling_keys,
)

OP = "chunk_gated_delta_rule"
pytestmark = [
    pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
# Of the whole chain, with its rounded intermediates.
LIMITS = {"float32": (2e-6, 8e-6), "bfloat16": (8e-3, 2e-2), "float16": (1e-3, 2.5e-3)}
TENSORS = ("q", "k", "v", "g", "beta")


def run(given: dict[str, Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    options = {"return_final_state": True} | options
    return call(
        triton_ssm.chunk_gated_delta_rule, *(given[name] for name in TENSORS),
        initial_state=given["initial_state"], cu_seqlens=given["cu_seqlens"], **options,
    )  # fmt: skip


def check(given: dict[str, Any], times: float = 1.0, **options: Any) -> None:
    """`times`: how much further off a result may be, where keys of few elements make all tokens resemble each other."""
    found = run(given, **options)
    options = {name: value for name, value in options.items() if name != "precision"}
    expected = oracle.chunk_gated_delta_rule(
        *(given[name] for name in TENSORS),
        initial_state=given["initial_state"], cu_seqlens=given["cu_seqlens"], **options,
    )  # fmt: skip
    for got, ref in zip(found, expected, strict=True):
        measured = error(got, ref)
        relative, worst = LIMITS[given["k"].dtype.name]
        assert measured.within(times * relative, times * worst), measured
    rows = 0 if given["cu_seqlens"] is None else given["cu_seqlens"][-1]
    if given["cu_seqlens"] is not None:
        assert not found[0][:, rows:].astype(np.float32).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("L", [16, 32, 64])
def test_packed(L, dtype):
    given = draw((17, 0, 70, 1, 33), tail=9, packed=True, dtype=dtype, H_k=2, H_v=4)
    check(poison(given, slice(121, None)), chunk_size=L)


def test_dense_options():
    given = draw((75,), B=2, H_k=1, H_v=3, K=20, V=40, dtype="bfloat16", initial=False)
    check(given)
    check(given, use_qk_l2norm=True, scale=0.5, chunk_size=16)
    given["g"], given["beta"] = given["g"].astype(np.float16), given["beta"].astype(given["q"].dtype)
    check(given, use_qk_l2norm=True, chunk_size=32)
    check(draw((30,), dtype="float32", H_v=1), precision="tf32", chunk_size=16)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_drawn(data):
    packed = data.draw(st.booleans())
    H_k = data.draw(st.integers(1, 2))
    lengths = tuple(data.draw(st.lists(st.integers(0, 40), min_size=0 if packed else 1, max_size=4 if packed else 1)))
    given = draw(
        lengths, packed=packed, H_k=H_k, H_v=H_k * data.draw(st.integers(1, 2)), K=data.draw(st.integers(4, 40)),
        V=data.draw(st.integers(1, 40)), tail=data.draw(st.integers(0, 20)) if packed else 0,
        B=1 if packed else data.draw(st.integers(1, 2)), dtype=data.draw(st.sampled_from(["float32", "float16"])),
        initial=data.draw(st.booleans()), seed=data.draw(st.integers(0, 99)), rise=data.draw(st.sampled_from([0.0, 0.2])),
    )  # fmt: skip
    check(given, 8.0, chunk_size=data.draw(st.sampled_from([16, 32])), use_qk_l2norm=data.draw(st.booleans()))


def test_where_the_fused_kernels_take_no_call_the_stages_run(monkeypatch):
    """Whatever the table says: here nothing can run them, elsewhere dtype, sizes or device may be others."""
    launched = []

    def record(self, key, grid, arguments, constants, num_warps):
        launched.append(self._kernel.fn.__name__)

    monkeypatch.setattr(Launcher, "_launch", record)
    given = draw((50,), dtype="bfloat16", K=64, V=64)
    for fused in (False, True):
        launched.clear()
        with override(OP, FUSED=fused):
            run(given)
        assert launched == ["kkt_solve_kernel", "recompute_w_u_kernel", "chunk_delta_h_kernel", "chunk_o_kernel"]


SERVED = Dims(B=1, T=100, H_k=1, H_v=2, K=128, V=128, L=64, NC=2, N_seq=1, packed=False)
UNSERVED: list[dict[str, Any]] = [
    {"T": 0}, {"N_seq": 0, "packed": True}, {"L": 32}, {"K": 96}, {"K": 256}, {"V": 96}, {"V": 320},
    {"B": 2**10, "T": 2**20, "NC": 2**14},  # 2^31 rows of Y
]  # fmt: skip


def served(dims: Dims, dtype: torch.dtype = torch.bfloat16, address: int = 16, device: str = "cuda") -> bool:
    """Of an output that is nowhere."""
    o = SimpleNamespace(
        device=torch.device(device),
        dtype=dtype,
        numel=lambda: dims.B * dims.T * dims.H_v * dims.V,
        data_ptr=lambda: address,
    )
    return _loop.serves(dims, cast(torch.Tensor, o))


def test_which_calls_the_fused_kernels_take(monkeypatch):
    assert not served(SERVED), "in the interpreter"
    monkeypatch.setattr(
        _prepare, "triton", SimpleNamespace(knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
    )
    monkeypatch.setattr(_fused_gluon, "_is_hopper", lambda index: True)
    assert served(SERVED) and served(dataclasses.replace(SERVED, K=64, V=64), torch.float16)
    assert not served(SERVED, torch.float32) and not served(SERVED, address=8) and not served(SERVED, device="cpu")
    for change in UNSERVED:
        assert not served(dataclasses.replace(SERVED, **change)), change
    monkeypatch.setattr(_fused_gluon, "_is_hopper", lambda index: False)
    assert not served(SERVED)


@pytest.mark.parametrize("sms", [4, 132])
@pytest.mark.parametrize("packed", [False, True])
def test_what_the_fused_kernels_are_given(monkeypatch, packed, sms):
    """Every argument at its parameter's place, and tiles that divide the tensors they are of."""
    launched: dict[str, dict[str, Any]] = {}

    def record(self, key, grid, arguments, constants, num_warps):
        names = [argument.arg for argument in definition(kernels[self]).args.args]
        launched[names[0]] = dict(zip(names, (*arguments, *constants), strict=True)) | {"grid": grid}

    kernels = {_loop._LOOP: gdn_loop_kernel_hopper, _prepare._PREPARE: gdn_prepare_kernel}
    monkeypatch.setattr(_loop, "serves", lambda dims, o: True)
    monkeypatch.setattr(_loop, "_SMS", sms)
    monkeypatch.setattr(Launcher, "_launch", record)
    given = draw((70, 0, 3) if packed else (73,), packed=packed, B=1, H_k=2, H_v=4, K=64, V=128, dtype="bfloat16")
    with override(OP, FUSED=True, HEADS=2, num_stages=4):
        run(given, use_qk_l2norm=True)
    prepare, loop = launched["q_ptr"], launched["o_ptr"]
    dense = {name: to_torch(given[name], "cpu") for name in "qkv"}
    slots = 73 // 64 + 3 if packed else 2
    assert prepare["grid"] == (slots * 2, 1, 1) and loop["grid"] == (
        (3 + 1 if packed else 1) * 4 * (2 if sms == 132 else 1),
        1,
        1,
    )
    shapes = {"q": (73, 2 * 64), "k": (73, 2 * 64), "v": (73, 4 * 128)}
    shapes |= dict.fromkeys(("PX", "Y"), (slots * 4 * 64, 64))
    for name, shape in shapes.items():
        tiles = loop[f"{name}_desc"]
        assert (tiles.shape, tiles.strides, tiles.block_shape) == ([*shape], [shape[1], 1], [64, 64]), name
        assert torch.equal(tiles.base, dense[name]) if name in dense else tiles.base.numel() == math.prod(shape)
        assert name == "v" or tiles.base is prepare[f"{name}_ptr"]
    gates = loop["gates_desc"]
    assert gates.base is prepare["gates_ptr"] and (gates.shape, gates.block_shape) == ([slots * 4 * 2, 128], [2, 128])
    assert loop["o_desc"].base is loop["o_ptr"] and loop["o_desc"].shape == [73, 4 * 128]
    copies = [prepare[name] for name in ("q_copies", "k_copies", "g_stride", "beta_stride")]
    assert copies == [16, 16, 4, 4] and prepare["scale"] == 64**-0.5
    sizes = {name: loop[name] for name in ("n_tokens", "n_sequences", "H_K", "H_V", "K", "V", "WARPGROUPS", "STAGES")}
    assert list(sizes.values()) == [73, 3 if packed else 1, 2, 4, 64, 128, 1 if sms == 132 else 2, 4]
    assert loop["final_ptr"].shape == loop["initial_ptr"].shape


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape).to(torch.bfloat16)


READ: dict[str, tuple[torch.Tensor, int | None]] = {  # numbers from token to token; None where a copy is needed
    "dense": (numbers(2, 5, 48), 48),
    "one of a projection": (numbers(2, 5, 104)[..., 8:56], 104),
    "at an odd place": (numbers(2, 5, 104)[..., 7:55], None),
    "at odd distances": (numbers(2, 5, 101)[..., :48], None),
    "every other token": (numbers(1, 9, 56)[:, ::2, :48], 112),
    "batch rows further apart": (numbers(2, 9, 48)[:, :5], None),
    "one batch row again": (numbers(1, 5, 48).expand(2, 5, 48), None),
    "one token again": (numbers(1, 1, 48).expand(1, 5, 48), None),
    "one token": (numbers(1, 1, 101)[..., :48], 48),
    "one token of each row": (numbers(2, 3, 48)[:, 1:2], 144),
}


@pytest.mark.parametrize("rows, stride", READ.values(), ids=READ)
def test_what_both_fused_kernels_can_read(rows, stride):
    """Tokens at one distance, a multiple of 16 bytes; all else is copied."""
    x = rows.unflatten(2, (3, 16))
    found, distance = _prepare.readable(x, x.stride(0) if len(x) > 1 else 0, x.stride(1))
    assert torch.equal(found, x) and distance == (stride or 48)
    assert found is x if stride else found.is_contiguous() and found.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_neighbours_and_padding_reach_nobody(value):
    given = draw((20, 30, 5), packed=True, tail=20, dtype="bfloat16")
    spoilt = poison(poison(given, slice(20, 50), value), slice(55, 75), value)
    (o, final), (bad_o, bad_final) = run(given, chunk_size=16), run(spoilt, chunk_size=16)
    for rows in (slice(0, 20), slice(50, 55)):
        assert o[:, rows].tobytes() == bad_o[:, rows].tobytes()
    assert not bad_o[:, 55:].astype(np.float32).any()
    assert final[[0, 2]].tobytes() == bad_final[[0, 2]].tobytes()


def test_packing_changes_no_bit_of_a_sequence():
    given = draw((20, 0, 30, 5), packed=True, tail=3, dtype="bfloat16")
    o, final = run(given, chunk_size=16, use_qk_l2norm=True)
    for n, (begin, end) in enumerate(((0, 20), (20, 20), (20, 50), (50, 55))):
        one = {name: given[name][:, begin:end] for name in TENSORS}
        alone = one | {"initial_state": given["initial_state"][n : n + 1], "cu_seqlens": None}
        one_o, one_final = run(alone, chunk_size=16, use_qk_l2norm=True)
        assert one_o[0].tobytes() == o[0, begin:end].tobytes() and one_final[0].tobytes() == final[n].tobytes()


def test_a_prompt_resumed_at_a_chunk_gives_the_same_bits():
    given = draw((50,), dtype="bfloat16", initial=False)
    o, final = run(given, chunk_size=16)
    first = {name: given[name][:, :32] for name in TENSORS} | {"initial_state": None, "cu_seqlens": None}
    rest = {name: given[name][:, 32:] for name in TENSORS} | {"cu_seqlens": None}
    first_o, state = run(first, chunk_size=16)
    rest_o, last = run({**rest, "initial_state": state}, chunk_size=16)
    assert np.concatenate([first_o, rest_o], 1).tobytes() == o.tobytes() and last.tobytes() == final.tobytes()


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.3])
def test_keys_that_resemble_each_other(noise):
    """Full strength and hardly any decay: what the inverse must survive. In fp32 no digit more is lost than elsewhere."""
    T = 130
    given = draw((T,), H_v=1, K=64)
    given["k"] = resembling_keys(T, noise)
    given["beta"] = np.full((1, T, 1), 0.999, np.float32)
    given["g"] = np.full((1, T, 1), -1e-4, np.float32)
    check(given)


def test_out_and_no_final_state():
    given = draw((20,), dtype="bfloat16", initial=False)
    tensors = [to_torch(given[name], "cpu") for name in TENSORS]
    expected, none = triton_ssm.chunk_gated_delta_rule(*tensors)
    out = torch.empty_like(tensors[2])
    o, _ = triton_ssm.chunk_gated_delta_rule(*tensors, out=out)
    assert none is None and o is out and torch.equal(o, expected)


def test_views_of_one_projection():
    given = draw((40,), H_k=2, H_v=2, K=16, V=16, dtype="bfloat16")
    wide = torch.full((1, 40, 101), float("nan"), dtype=torch.bfloat16)
    views = []
    for first, name in ((0, "q"), (32, "k"), (64, "v")):
        views.append(wide[:, :, first : first + 32].unflatten(2, (2, 16)))
        views[-1].copy_(to_torch(given[name], "cpu"))
    wide[:, :, 96:98], wide[:, :, 98:100] = to_torch(given["g"], "cpu"), to_torch(given["beta"], "cpu")
    views += [wide[:, :, 96:98], wide[:, :, 98:100]]
    for normed in (False, True):
        o, _ = triton_ssm.chunk_gated_delta_rule(*views, chunk_size=16, use_qk_l2norm=normed)
        dense, _ = triton_ssm.chunk_gated_delta_rule(
            *(view.contiguous() for view in views), chunk_size=16, use_qk_l2norm=normed
        )  # fmt: skip
        assert torch.equal(o, dense)


def test_nothing_is_work_too():
    for nothing in (draw((), packed=True), draw((0, 0), packed=True), draw((), packed=True, tail=20), draw((0,))):
        o, final = run(nothing, use_qk_l2norm=True)
        assert not o.any() and np.array_equal(final, nothing["initial_state"])


def test_explain_takes_the_call_and_says_what_it_would_launch():
    given = draw((20,), H_v=2)
    tensors = [to_torch(given[name], "cpu") for name in TENSORS]
    said = str(triton_ssm.explain(OP, *tensors, use_qk_l2norm=True))
    assert "K=16, V=32, chunk_size=64, float32, size 2 = sequences x value heads" in said
    with override(OP, FUSED=True):
        assert triton_ssm.explain(OP, *tensors).config["FUSED"] is True
    for stage, arguments in (
        ("chunk_local_cumsum", (tensors[3],)), ("chunk_scaled_dot_kkt", (tensors[1], tensors[4])),
        ("solve_tril", (torch.zeros(1, 20, 2, 64),)),
        ("recompute_w_u", (tensors[1], tensors[2], tensors[4], torch.zeros(1, 20, 2, 64))),
        ("chunk_delta_h", (tensors[1], torch.zeros(1, 20, 2, 16), tensors[2])),
        ("chunk_o", (tensors[0], tensors[1], tensors[2], torch.zeros(1, 1, 2, 16, 32))),
    ):  # fmt: skip
        assert f"gdn_{stage} [triton]" in str(triton_ssm.explain(f"gdn.{stage}", *arguments))


ERRORS = [
    (put(0, lambda q: q[..., :-1]), ValueError, r"q: expected shape \(B=1, T=20, H_k=1, K=16\), got"),
    (put(1, lambda k: k.half()), TypeError, r"q: expected the dtype of k, float16, got float32"),
    (put(2, lambda v: v[0]), ValueError, r"v: expected rank 4 \[B, T, H_v, V\]"),
    (put(3, lambda g: g[..., :1]), ValueError, r"g: expected shape \(B=1, T=20, H_v=2\), got \(1, 20, 1\)"),
    (put(4, lambda b: None), TypeError, r"beta: expected a torch.Tensor, got NoneType"),
    (put(4, lambda b: b.int()), TypeError, r"beta: expected dtype float32 or bfloat16 or float16, got int32"),
    (give(initial_state=lambda s: torch.zeros(2, 2, 16, 32)), ValueError, r"initial_state: expected shape \(N_seq=1,"),
    (give(use_qk_l2norm=lambda _: 1), TypeError, r"use_qk_l2norm: expected a bool, got int"),
    (give(return_final_state=lambda _: None), TypeError, r"return_final_state: expected a bool, got NoneType"),
    (give(chunk_size=lambda _: 128), ValueError, r"chunk_size: expected a power of two from 16 to 64, got 128"),
    (give(precision=lambda _: None), ValueError, r"precision: expected 'ieee' or 'tf32', got None"),
    (give(scale=lambda _: True), TypeError, r"scale: expected a float or None, got bool"),
    (give(out=lambda _: torch.zeros(1, 20, 2, 31)), ValueError, r"out: expected shape \(1, 20, 2, 32\)"),
]


@pytest.mark.parametrize("spoil, kind, text", ERRORS, ids=[text for *_, text in ERRORS])
def test_errors_name_the_argument(spoil, kind, text):
    given = draw((20,), H_v=2)
    arguments, keywords = [to_torch(given[name], "cpu") for name in TENSORS], {}
    spoil(arguments, keywords)
    with pytest.raises(kind, match=text):
        triton_ssm.chunk_gated_delta_rule(*arguments, **keywords)
    if "out" not in keywords and "scale" not in keywords:
        with pytest.raises(kind, match=text):
            triton_ssm.explain(OP, *arguments, **keywords)


def test_a_gradient_is_refused_and_not_dropped():
    given = draw((20,), H_v=2)
    tensors = [to_torch(given[name], "cpu") for name in TENSORS]
    tensors[3].requires_grad_()
    with pytest.raises(RuntimeError, match="g: chunk_gated_delta_rule has no backward in triton_ssm"):
        triton_ssm.chunk_gated_delta_rule(*tensors)


KERNELS = (
    "_between_kernel", "_chunk_delta_h_kernel", "_chunk_local_cumsum_kernel", "_chunk_o_gluon_kernel", "_chunk_o_kernel",
    "_chunk_scaled_dot_kkt_kernel", "_ends_kernel", "_invert", "_kkt_solve_kernel", "_l2norm_kernel", "_loop_kernel", "_pairs",
    "_prepare_inverse", "_prepare_kernel", "_recompute_w_u_kernel", "_recurrent_kernel", "_solve_tril_kernel",
)  # fmt: skip


def definition(function: Any) -> ast.FunctionDef:
    (found,) = (
        node
        for node in ast.parse(textwrap.dedent(inspect.getsource(function.fn))).body
        if isinstance(node, ast.FunctionDef)
    )
    return found


@pytest.mark.parametrize("module", KERNELS)
def test_every_argument_a_kernel_takes_is_read(module):
    """An integer that nobody reads still keys a compile for every new class of its values."""
    functions = inspect.getmembers(
        import_module(f"triton_ssm.gdn.{module}"),
        lambda member: hasattr(member, "fn") and inspect.isfunction(member.fn),
    )
    assert functions
    for name, function in functions:
        tree = definition(function)
        read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        unread = {argument.arg for argument in tree.args.args} - read
        assert not unread, f"{name} never reads {sorted(unread)}"


def unspecialised(function: Any) -> set[str]:
    for decorator in definition(function).decorator_list:
        for keyword in getattr(decorator, "keywords", ()):
            if keyword.arg == "do_not_specialize":
                return set(ast.literal_eval(keyword.value))
    return set()


def test_lengths_and_packings_share_their_compiled_kernels(monkeypatch):
    """What Triton would compile anew for: constants, options, types, and the classes of integers that it specialises on."""
    variants: dict[str, set[Any]] = {}

    def record(self, key, grid, arguments, constants, num_warps):
        kernel = self._kernel
        names = [argument.arg for argument in definition(kernel).args.args]
        skipped = unspecialised(kernel)
        seen = []
        for name, value in zip(names, arguments, strict=False):
            if isinstance(value, torch.Tensor):
                seen.append(value.dtype)
            elif isinstance(value, int) and name not in skipped:
                seen.append((value == 1, value % 16 == 0))
            else:
                seen.append(type(value))
        variants.setdefault(kernel.fn.__name__, set()).add((tuple(seen), constants, num_warps))

    monkeypatch.setattr(Launcher, "_launch", record)
    rng = np.random.default_rng(0)
    for T in range(1, 51):
        lengths = tuple(np.diff([0, *np.sort(rng.integers(0, T + 1, T % 5)), T]).tolist())
        for packed in (False, True):
            given = draw(lengths, packed=packed, H_v=2, dtype="bfloat16")
            run(given, chunk_size=16, use_qk_l2norm=True)
            for B in (1, 2):
                if not packed:
                    run(draw((T,), B=B, H_v=2, dtype="bfloat16"), chunk_size=16, use_qk_l2norm=True)
    assert len(variants) == 5
    # Dense and packed; norms do not know of sequences.
    assert {name: len(found) for name, found in variants.items()} == dict.fromkeys(variants, 2) | {"l2norm_kernel": 1}
