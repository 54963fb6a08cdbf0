"""`triton_ssm.gdn`'s stages in the interpreter against the float64 oracle: every option, packing, neighbours, errors."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_configs import override
from triton_ssm import gdn
from triton_ssm._plans import Launcher

from .compare import error
from .inputs import DTYPES
from .oracle import gdn as oracle
from .runners import from_torch, to_torch

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
# ‖got - ref‖₂ / ‖ref‖₂ and max |got - ref| / max |ref| of one stage, given the same inputs.
LIMITS = {"float32": (1e-6, 4e-6), "bfloat16": (5e-3, 1.2e-2), "float16": (6e-4, 1.5e-3)}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new tensor starts as NaN, so that an element which a kernel forgets is seen."""
    empty = torch.empty

    def nan(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan)


def draw(
    lengths: tuple[int, ...] = (50,), *, B: int = 1, H_k: int = 1, H_v: int = 2, K: int = 16, V: int = 32, tail: int = 0,
    packed: bool = False, dtype: str = "float32", initial: bool = True, seed: int = 0, rise: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """q, k, v, g, beta, initial_state and cu_seqlens. `rise`: how far above zero a gate may be."""
    rng = np.random.default_rng(seed)
    T, kind = sum(lengths) + tail, DTYPES[dtype]
    k = rng.standard_normal((B, T, H_k, K))
    found: dict[str, Any] = {
        "q": rng.standard_normal((B, T, H_k, K)).astype(kind),
        "k": (k / np.linalg.norm(k, axis=-1, keepdims=True)).astype(kind),
        "v": rng.standard_normal((B, T, H_v, V)).astype(kind),
        "g": rng.uniform(-0.2, rise, (B, T, H_v)).astype(np.float32),
        "beta": rng.uniform(0, 1, (B, T, H_v)).astype(np.float32),
        "initial_state": None,
        "cu_seqlens": np.cumsum([0, *lengths]).astype(np.int32) if packed else None,
    }
    if initial:
        found["initial_state"] = rng.standard_normal((len(lengths) if packed else B, H_v, K, V)).astype(np.float32)
    return found


def poison(given: dict[str, Any], rows: slice, value: float = math.nan) -> dict[str, Any]:
    """`given` with another value in those tokens of every tensor that has tokens."""
    spoilt = dict(given)
    for name in ("q", "k", "v", "g", "beta"):
        spoilt[name] = given[name].copy()
        spoilt[name][:, rows] = value
    return spoilt


def call(function, *tensors: Any, **options: Any) -> Any:
    """NumPy in, NumPy out."""
    found = function(
        *(to_torch(t, "cpu") for t in tensors), **{name: to_torch(value, "cpu") for name, value in options.items()}
    )
    return tuple(map(from_torch, found)) if isinstance(found, tuple) else from_torch(found)


def near(got: Any, ref: np.ndarray, dtype: str, times: float = 1.0) -> None:
    """`got` against `ref`, but for what has no meaning; rows of zeros must be zero."""
    relative, worst = LIMITS[dtype]
    meant = ~np.isnan(ref)
    measured = error(np.asarray(got, np.float64)[meant], ref[meant])
    assert measured.within(times * relative, times * worst), measured
    empty = meant.all(-1) & ~ref.any(-1)
    assert not np.asarray(got, np.float64)[empty].any()


def stages(given: dict[str, Any], L: int, gated: bool = True) -> Iterator[tuple[str, tuple, dict[str, Any], Any]]:
    """(stage, its tensors, its options, the oracle's result), each stage fed what the oracle has of those before, rounded."""
    kind, packed = given["k"].dtype, {"cu_seqlens": given["cu_seqlens"]}
    sized = {"chunk_size": L, **packed}
    q, k, v, beta = (given[name] for name in ("q", "k", "v", "beta"))
    sums = oracle.chunk_local_cumsum(given["g"], **sized)
    yield "chunk_local_cumsum", (given["g"],), sized, sums
    g = sums.astype(np.float32) if gated else None
    A = oracle.chunk_scaled_dot_kkt(k, beta, g=g, **sized)
    yield "chunk_scaled_dot_kkt", (k, beta), {"g": g, **sized}, A
    A = A.astype(np.float32)
    inverse = oracle.solve_tril(A, **packed)
    yield "solve_tril", (A,), packed, inverse
    inverse = inverse.astype(np.float32).astype(kind)
    w, u = oracle.recompute_w_u(k, v, beta, inverse, g=g, **packed)
    yield "recompute_w_u", (k, v, beta, inverse), {"g": g, **packed}, (w, u)
    w, u = w.astype(kind), u.astype(kind)
    carried = {"g": g, "initial_state": given["initial_state"], **sized}
    h, v_new, final = oracle.chunk_delta_h(k, w, u, **carried)
    yield "chunk_delta_h", (k, w, u), carried, (h, v_new, final)
    h, v_new = h.astype(kind), v_new.astype(kind)
    yield "chunk_o", (q, k, v_new, h), {"g": g, **sized}, oracle.chunk_o(q, k, v_new, h, g=g, **sized)


def check(given: dict[str, Any], L: int, gated: bool = True, times: float = 1.0) -> None:
    """`times`: how much further off a result may be, where so few elements make it that one rounding is all of its error."""
    dtype = given["k"].dtype.name
    fp32 = ("chunk_local_cumsum", "solve_tril")
    for name, tensors, options, expected in stages(given, L, gated):
        got = call(getattr(gdn, name), *tensors, **options)
        pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
        for one, other in pairs:
            near(one, other, "float32" if name in fp32 else dtype, times)


PACKED = {"lengths": (17, 0, 70, 1, 33), "tail": 9, "packed": True}


@pytest.mark.parametrize("L", [16, 32, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_packed(L, dtype):
    given = draw(**PACKED, dtype=dtype, H_k=2, H_v=4)
    check(poison(given, slice(121, None)), L)


@pytest.mark.parametrize("L", [16, 64])
@pytest.mark.parametrize("gated", [True, False])
def test_dense(L, gated):
    check(draw((75,), B=2, H_k=1, H_v=3, initial=gated), L, gated)


@pytest.mark.parametrize("K, V", [(60, 100), (17, 5), (130, 24)])
def test_sizes_that_are_no_power_of_two(K, V):
    check(draw((40,), K=K, V=V, H_v=1), 16)
    check(draw((40,), K=K, V=V, H_v=1, dtype="bfloat16"), 32)


def test_gates_of_either_sign():
    """Above the diagonal exp(g[i] - g[j]) then overflows, and so would a clamp below it go wrong."""
    given = draw((64,), H_v=1, rise=0.1)
    given["g"][:, 5] = -300.0
    check(given, 64)
    given["g"] = np.full_like(given["g"], 8.0)  # e^120 above the diagonal, e^-120 where it counts
    given["g"][:, 1::2] = -8.1
    check(given, 64)
    given["g"] = np.abs(draw((64,), H_v=1)["g"])
    check(given, 16)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_drawn(data):
    packed = data.draw(st.booleans())
    H_k = data.draw(st.integers(1, 2))
    lengths = tuple(data.draw(st.lists(st.integers(0, 40), min_size=0 if packed else 1, max_size=4 if packed else 1)))
    given = draw(
        lengths, packed=packed, H_k=H_k, H_v=H_k * data.draw(st.integers(1, 2)), K=data.draw(st.integers(1, 40)),
        V=data.draw(st.integers(1, 40)), tail=data.draw(st.integers(0, 20)) if packed else 0,
        B=1 if packed else data.draw(st.integers(1, 2)), dtype=data.draw(st.sampled_from(["float32", "float16"])),
        initial=data.draw(st.booleans()), seed=data.draw(st.integers(0, 99)), rise=data.draw(st.sampled_from([0.0, 0.2])),
    )  # fmt: skip
    # Of a single channel or token little may be left after cancellation, and what was rounded weighs more.
    check(given, data.draw(st.sampled_from([16, 32])), data.draw(st.booleans()), times=16.0)


def run_stages(given: dict[str, Any], L: int) -> dict[str, np.ndarray]:
    """All results of the stages, each fed by the one before."""
    packed = {"cu_seqlens": given["cu_seqlens"]}
    sized = {"chunk_size": L, **packed}
    q, k, v, beta = (given[name] for name in ("q", "k", "v", "beta"))
    g = call(gdn.chunk_local_cumsum, given["g"], **sized)
    A = call(gdn.chunk_scaled_dot_kkt, k, beta, g=g, **sized)
    inverse = call(functools.partial(gdn.solve_tril, out_dtype=to_torch(k, "cpu").dtype), A, **packed)
    w, u = call(gdn.recompute_w_u, k, v, beta, inverse, g=g, **packed)
    h, v_new, final = call(gdn.chunk_delta_h, k, w, u, g=g, initial_state=given["initial_state"], **sized)
    o = call(gdn.chunk_o, q, k, v_new, h, g=g, **sized)
    return {"g": g, "A": A, "inverse": inverse, "w": w, "u": u, "v_new": v_new, "o": o, "h": h, "final": final}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_neighbours_and_padding_reach_nobody(dtype, value):
    given = draw((20, 30, 5), packed=True, tail=20, dtype=dtype)
    clean, spoilt = (
        run_stages(given, 16),
        run_stages(poison(poison(given, slice(20, 50), value), slice(55, 75), value), 16),
    )
    for name, result in clean.items():
        if name == "final":
            assert result[[0, 2]].tobytes() == spoilt[name][[0, 2]].tobytes()
        elif name == "h":  # slots: 0 and 1, 2 and 3, 5
            assert result[:, [0, 1, 5]].tobytes() == spoilt[name][:, [0, 1, 5]].tobytes()
        else:
            assert result[:, :20].tobytes() == spoilt[name][:, :20].tobytes(), name
            assert result[:, 50:55].tobytes() == spoilt[name][:, 50:55].tobytes(), name
            assert not spoilt[name][:, 55:].astype(np.float32).any(), name


def test_packing_changes_no_bit_of_a_sequence():
    given = draw((20, 0, 30, 5), packed=True, tail=3, dtype="bfloat16")
    together = run_stages(given, 16)
    for n, (begin, end) in enumerate(((0, 20), (20, 20), (20, 50), (50, 55))):
        one = {name: given[name][:, begin:end] for name in ("q", "k", "v", "g", "beta")}
        alone = run_stages({**one, "initial_state": given["initial_state"][n : n + 1], "cu_seqlens": None}, 16)
        for name, result in alone.items():
            if name == "final":
                assert result[0].tobytes() == together[name][n].tobytes()
            elif name != "h":
                assert result[0].tobytes() == together[name][0, begin:end].tobytes()


def resembling_keys(T: int, noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((1, 1, 1, 64)) + noise * rng.standard_normal((1, T, 1, 64))
    return (k / np.linalg.norm(k, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("L", [16, 32, 64])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("beta, limit", [(1.0, 1e-6), (0.9, 1e-6), (1.99, 2e-4)])
def test_the_inverse_of_keys_that_resemble_each_other(L, noise, beta, limit):
    """No decay and full strength, where powers of A grow beyond 10^15. beta beyond 1, as negative eigenvalues have it, makes
    the inverse itself large: the condition then costs what it must."""
    k = resembling_keys(L, noise)
    A = oracle.chunk_scaled_dot_kkt(k, np.full((1, L, 1), beta), chunk_size=L).astype(np.float32)
    expected = oracle.solve_tril(A)
    measured = error(call(gdn.solve_tril, A), expected)
    assert measured.within(limit, limit), measured


def test_options_of_the_output():
    given = draw((40,), H_k=1, H_v=4, dtype="bfloat16", initial=False)
    *_, (_, (q, k, v, h), options, _) = stages(given, 16)
    h32 = np.random.default_rng(0).standard_normal(h.shape).astype(np.float32)
    for changed, state in (
        ({"gate_base": "2"}, h), ({"scale": 0.25}, h), ({"scale": 1}, h), ({"state_layout": "VK"}, h.swapaxes(-1, -2)),
        ({}, h32), ({"state_layout": "VK", "g": None}, h32.swapaxes(-1, -2)),
    ):  # fmt: skip
        merged: dict[str, Any] = options | changed
        near(call(gdn.chunk_o, q, k, v, state, **merged), oracle.chunk_o(q, k, v, state, **merged), "bfloat16")
    tensors = [to_torch(t, "cpu") for t in (q, k, v, h)]
    named = {name: to_torch(value, "cpu") for name, value in options.items()}
    expected = gdn.chunk_o(*tensors, **named)
    out = torch.empty_like(tensors[2])
    assert gdn.chunk_o(*tensors, **named, out=out) is out and torch.equal(out, expected)
    for heads, stages_ in ((1, 1), (2, 2), (4, 2), (8, 1)):
        knobs: dict[str, Any] = {
            "BLOCK_SIZE_K": 16,
            "BLOCK_SIZE_V": 16,
            "HEADS": heads,
            "num_warps": 4,
            "num_stages": stages_,
        }
        with override("gdn_chunk_o", **knobs):
            assert torch.equal(gdn.chunk_o(*tensors, **named), expected)


def test_the_inverse_in_16_bits_is_the_rounded_one():
    A = np.tril(np.random.default_rng(0).standard_normal((1, 20, 2, 32)) * 0.3, -1).astype(np.float32)
    exact = gdn.solve_tril(to_torch(A, "cpu"))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(gdn.solve_tril(to_torch(A, "cpu"), out_dtype=dtype), exact.to(dtype))


@pytest.mark.parametrize("BT", [16, 32, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_A_by_the_tensor_memory_accelerator(packed: bool, BT: int, monkeypatch: pytest.MonkeyPatch):
    """The same bits, whoever asks for it; and where a device has none, nobody is asked."""
    A = np.tril(np.random.default_rng(0).standard_normal((1, 90, 3, BT)) * 0.2, -1).astype(np.float32)
    A[:, 77:] = np.nan  # behind the sequences, in the tile of the last
    bounds: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 7, 7, 71, 77])} if packed else {}
    tensor = to_torch(A if packed else A[:, :77], "cpu")
    launched: list[bool] = []

    def record(self, key, grid, arguments, constants, num_warps):
        launched.append(arguments[2] is not None)
        return launch(self, key, grid, arguments, constants, num_warps)

    launch = Launcher.__call__
    monkeypatch.setattr(Launcher, "__call__", record)
    expected = gdn.solve_tril(tensor, **bounds)
    with override("gdn_solve_tril", use_tma=True):
        by_table = gdn.solve_tril(tensor, **bounds)
    monkeypatch.setenv("FLA_USE_TMA", "1")
    by_switch = gdn.solve_tril(tensor, **bounds)
    monkeypatch.setenv("SSM_DEVICE_NAME", "AMD Instinct MI300X")
    elsewhere = gdn.solve_tril(tensor, **bounds)
    assert launched == [False, True, True, False] and not expected.isnan().any()
    assert all(torch.equal(expected, other) for other in (by_table, by_switch, elsewhere))


def test_what_stands_above_the_diagonal_of_A_is_not_read():
    A = np.random.default_rng(0).standard_normal((1, 32, 1, 32)).astype(np.float32) * 0.1
    rows, columns = np.arange(32)[:, None], np.arange(32)[None]
    spoilt = A.copy()
    spoilt[0, :, 0][rows <= columns] = np.nan
    assert call(gdn.solve_tril, A).tobytes() == call(gdn.solve_tril, spoilt).tobytes()


def test_tf32_is_taken():
    given = draw((20,), H_v=1)
    for name, tensors, options, expected in stages(given, 16):
        if name not in ("chunk_local_cumsum", "solve_tril"):
            got = call(functools.partial(getattr(gdn, name), precision="tf32"), *tensors, **options)
            for one, other in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
                near(one, other, "float32")  # the interpreter does not round


def test_views_of_one_projection():
    given = draw((40,), H_k=2, H_v=2, K=16, V=16, dtype="bfloat16")
    wide = torch.full((1, 40, 101), float("nan"), dtype=torch.bfloat16)
    views = {}
    for first, name in ((0, "q"), (32, "k"), (64, "v")):
        views[name] = wide[:, :, first : first + 32].unflatten(2, (2, 16))
        views[name].copy_(to_torch(given[name], "cpu"))
    wide[:, :, 96:98] = to_torch(given["beta"], "cpu")
    g = gdn.chunk_local_cumsum(to_torch(given["g"], "cpu"))
    for dense in (False, True):
        q, k, v = (view.contiguous() if dense else view for view in views.values())
        beta = wide[:, :, 96:98].contiguous() if dense else wide[:, :, 96:98]
        A = gdn.chunk_scaled_dot_kkt(k, beta, g=g)
        w, u = gdn.recompute_w_u(k, v, beta, gdn.solve_tril(A), g=g)
        h, v_new, final = gdn.chunk_delta_h(k, w, u, g=g)
        found = (A, w, u, h, v_new, final, gdn.chunk_o(q, k, v, h, g=g))
        if not dense:
            expected = found
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_tokens_too_far_apart_are_copied(monkeypatch):
    from triton_ssm.gdn import _plan

    monkeypatch.setattr(_plan, "_TOO_FAR", 70)
    given = draw((20,), B=2, H_v=1)
    k, v = (to_torch(given[name], "cpu") for name in ("k", "v"))
    apart = torch.full((2, 20, 1, 80), float("nan"))
    apart[..., :16] = k
    g = gdn.chunk_local_cumsum(to_torch(given["g"], "cpu"), chunk_size=16)
    found = [gdn.chunk_delta_h(key, k, v, g=g, chunk_size=16) for key in (k, apart[..., :16])]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_nothing_is_work_too():
    for nothing, NC in (
        (draw((), packed=True), 0), (draw((0, 0), packed=True), 2), (draw((), packed=True, tail=20), 1), (draw((0,)), 0),
    ):  # fmt: skip
        results = run_stages(nothing, 16)
        assert results["h"].shape[1] == NC
        assert not any(results[name].any() for name in ("g", "w", "u", "v_new", "o"))
        assert np.array_equal(results["final"], nothing["initial_state"])


def test_bounds_beyond_the_tokens_touch_nothing_else(monkeypatch):
    """Bounds are data, which nobody looks at on a GPU."""
    from triton_ssm import _arguments

    monkeypatch.setattr(_arguments, "check_bounds_on_host", lambda bounds, T: None)
    given = draw((20, 20), packed=True)
    for bounds in ([0, 20, 900], [-7, 20, 40], [0, 30, 20], [50, 60, 70]):
        wild = given | {"cu_seqlens": np.array(bounds, np.int32)}
        results = run_stages(wild, 16)
        assert np.isfinite(results["final"]).all()


def tensors_of(stage: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """A legal call, packed."""
    for name, tensors, options, _ in stages(draw((20, 12), packed=True, H_v=2), 16):
        if name == stage:
            return [to_torch(t, "cpu") for t in tensors], {n: to_torch(v, "cpu") for n, v in options.items()}
    raise AssertionError(stage)


def put(index, value):
    return lambda a, k: a.__setitem__(index, value(a[index]))


def give(**new):
    return lambda a, k: k.update({name: value(k.get(name)) for name, value in new.items()})


ERRORS = [
    ("chunk_local_cumsum", put(0, lambda g: g[0]), ValueError, r"g: expected rank 3 \[B, T, H_v\], got rank 2"),
    ("chunk_local_cumsum", put(0, lambda g: g.double()), TypeError, r"g: expected dtype .* got float64"),
    ("chunk_local_cumsum", put(0, lambda g: None), TypeError, r"g: expected a torch.Tensor, got NoneType"),
    ("chunk_local_cumsum", give(chunk_size=lambda _: 128), ValueError, r"chunk_size: expected a power of two from 16 to 64"),
    ("chunk_local_cumsum", give(chunk_size=lambda _: 48), ValueError, r"chunk_size: expected a power of two .* got 48"),
    ("chunk_local_cumsum", give(chunk_size=lambda _: 16.0), TypeError, r"chunk_size: expected an int, got float"),
    ("chunk_local_cumsum", give(cu_seqlens=lambda c: c.float()), TypeError, r"cu_seqlens: expected dtype int32 or int64"),
    ("chunk_local_cumsum", give(cu_seqlens=lambda c: c.flip(0)), ValueError, r"cu_seqlens: expected 0 <= …"),
    ("chunk_local_cumsum", give(cu_seqlens=lambda c: c[:0]), ValueError, r"cu_seqlens: expected shape \(N_seq \+ 1,\)"),
    ("chunk_local_cumsum", put(0, lambda g: g.expand(2, -1, -1)), ValueError, r"g: expected B=1 with cu_seqlens"),
    ("chunk_scaled_dot_kkt", put(0, lambda k: k[0]), ValueError, r"k: expected rank 4 \[B, T, H_k, K\]"),
    ("chunk_scaled_dot_kkt", put(0, lambda k: k.expand(1, 32, 3, 16)), ValueError, r"beta: expected H_v to be a multiple"),
    ("chunk_scaled_dot_kkt", put(0, lambda k: torch.zeros(1, 32, 1, 300)), ValueError, r"k: expected K <= 256, got"),
    ("chunk_scaled_dot_kkt", put(1, lambda b: b[:, 1:]), ValueError, r"beta: expected shape \(B=1, T=32, H_v=2\)"),
    ("chunk_scaled_dot_kkt", give(g=lambda g: g.bfloat16()), TypeError, r"g: expected dtype float32, got bfloat16"),
    ("chunk_scaled_dot_kkt", give(g=lambda g: g[..., :1]), ValueError, r"g: expected shape \(B=1, T=32, H_v=2\)"),
    ("chunk_scaled_dot_kkt", give(precision=lambda _: "bf16"), ValueError, r"precision: expected 'ieee' or 'tf32', got"),
    ("solve_tril", put(0, lambda A: A.half()), TypeError, r"A: expected dtype float32, got float16"),
    ("solve_tril", put(0, lambda A: A[..., :8]), ValueError, r"chunk_size: expected a power of two"),
    ("solve_tril", give(out_dtype=lambda _: torch.float64), TypeError, r"out_dtype: expected .* got torch.float64"),
    ("solve_tril", give(out_dtype=lambda _: "float32"), TypeError, r"out_dtype: expected .* got 'float32'"),
    ("recompute_w_u", put(1, lambda v: v.half()), TypeError, r"v: expected the dtype of k, float32, got float16"),
    ("recompute_w_u", put(1, lambda v: v[:, :-1]), ValueError, r"v: expected shape \(B=1, T=32, H_v=2, V=32\)"),
    ("recompute_w_u", put(3, lambda A: A[:, :-1]), ValueError, r"A: expected shape \(B=1, T=32, H_v=2, BT=16\)"),
    ("chunk_delta_h", put(1, lambda w: w[..., :-1]), ValueError, r"w: expected shape \(B=1, T=32, H_v=2, K=16\)"),
    ("chunk_delta_h", put(2, lambda u: u.half()), TypeError, r"u: expected the dtype of k"),
    ("chunk_delta_h", give(initial_state=lambda s: s[:1]), ValueError, r"initial_state: expected shape \(N_seq=2, H_v=2"),
    ("chunk_o", put(0, lambda q: q[..., :-1]), ValueError, r"q: expected shape \(B=1, T=32, H_k=1, K=16\)"),
    ("chunk_o", put(3, lambda h: h[:, 1:]), ValueError, r"h: expected shape \(B=1, NC=4, H_v=2, K=16, V=32\)"),
    ("chunk_o", give(state_layout=lambda _: "VK"), ValueError, r"h: expected shape \(B=1, NC=4, H_v=2, V=32, K=16\)"),
    ("chunk_o", give(state_layout=lambda _: "kv"), ValueError, r"state_layout: expected 'KV' or 'VK', got 'kv'"),
    ("chunk_o", give(gate_base=lambda _: 2), ValueError, r"gate_base: expected 'e' or '2', got 2"),
    ("chunk_o", give(scale=lambda _: math.nan), ValueError, r"scale: expected a finite number, got nan"),
    ("chunk_o", give(scale=lambda _: "1"), TypeError, r"scale: expected a float or None, got str"),
    ("chunk_o", give(out=lambda _: torch.zeros(1, 32, 2, 31)), ValueError, r"out: expected shape \(1, 32, 2, 32\), got"),
    ("chunk_o", give(out=lambda _: torch.zeros(1, 32, 2, 32).half()), TypeError, r"out: expected the dtype of v, float32"),
    ("chunk_o", give(out=lambda _: torch.zeros(1, 32, 32, 2).mT), ValueError, r"out: expected a dense tensor, got strides"),
    ("chunk_o", give(out=lambda _: 0), TypeError, r"out: expected a torch.Tensor, got int"),
    ("chunk_o", give(g=lambda g: g.to("meta")), ValueError, r"g: expected device cpu"),
]  # fmt: skip


@pytest.mark.parametrize("stage, spoil, kind, text", ERRORS, ids=lambda value: value if isinstance(value, str) else "")
def test_errors_name_the_argument(stage, spoil, kind, text):
    arguments, keywords = tensors_of(stage)
    spoil(arguments, keywords)
    with pytest.raises(kind, match=text):
        getattr(gdn, stage)(*arguments, **keywords)


@pytest.mark.parametrize(
    "stage",
    ["chunk_local_cumsum", "chunk_scaled_dot_kkt", "solve_tril", "recompute_w_u", "chunk_delta_h", "chunk_o"],
)
def test_a_gradient_is_refused_and_not_dropped(stage):
    arguments, keywords = tensors_of(stage)
    arguments[0].requires_grad_()
    with pytest.raises(RuntimeError, match=f"gdn.{stage} has no backward in triton_ssm"):
        getattr(gdn, stage)(*arguments, **keywords)
    with torch.no_grad():
        getattr(gdn, stage)(*arguments, **keywords)
