"""The gated delta rule of `pallas_ssm` against the oracle: the stages, the combined operator, decode, packing and isolation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_ssm.gdn
from pallas_ssm.gdn._xla_inverse import invert

from .compare import error
from .oracle import gdn as oracle

gdn: Any = pallas_ssm.gdn  # NumPy's arrays are as good as JAX's
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# ‖got - ref‖₂ / ‖ref‖₂ of one stage, and of all of them; beside it the largest that was measured here.
STAGE = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}  # 1.0e-7, 2.5e-3, 3.3e-4
COMBINED = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}  # 3.0e-7, 3.9e-3, 5.1e-4

LAYOUTS: dict[str, tuple[int, int, list[int] | None]] = {
    "dense": (2, 96, None),
    "a chunk begun": (2, 37, None),
    "packed": (1, 75, [0, 5, 5, 40, 73]),
    "packed, all empty but one": (1, 20, [0, 0, 0, 18, 18]),
}


def draw(
    B: int, T: int, H_k: int = 2, H_v: int = 4, K: int = 24, V: int = 16, dtype: str = "float32", seed: int = 0
) -> dict[str, Any]:
    """Arguments of the combined operator. Gates of either sign, as kernels have to take them."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, B, T, H_k, K))
    arrays: dict[str, Any] = {
        "q": q / np.linalg.norm(q, axis=-1, keepdims=True),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.standard_normal((B, T, H_v, V)),
    }
    arrays = {name: np.asarray(array).astype(DTYPES[dtype]) for name, array in arrays.items()}
    arrays["g"] = (rng.standard_normal((B, T, H_v)) * 0.2 - 0.1).astype(np.float32)
    arrays["beta"] = rng.uniform(0.0, 1.0, (B, T, H_v)).astype(np.float32)
    return arrays


def bounds(layout: str) -> tuple[int, int, np.ndarray | None]:
    B, T, cu_seqlens = LAYOUTS[layout]
    return B, T, None if cu_seqlens is None else np.array(cu_seqlens, np.int32)


def relative(got: Any, expected: np.ndarray) -> float:
    """What is NaN in `expected` has no meaning."""
    meant = ~np.isnan(expected)
    return error(np.asarray(got, np.float64)[meant], expected[meant]).relative


def same(first: Any, second: Any) -> bool:
    return np.asarray(first).tobytes() == np.asarray(second).tobytes()


STAGES = [
    *[("float32", layout, 16, True) for layout in LAYOUTS],
    ("float32", "packed", 64, True),
    ("float32", "packed", 32, False),
    ("float32", "dense", 64, False),
    ("bfloat16", "packed", 32, True),
    ("bfloat16", "a chunk begun", 64, True),
    ("float16", "packed", 32, True),
]


@pytest.mark.parametrize(("dtype", "layout", "chunk_size", "gated"), STAGES)
def test_stages(dtype: str, layout: str, chunk_size: int, gated: bool):
    """Each stage on what the one before made of it, so that an error is that stage's own."""
    B, T, cu_seqlens = bounds(layout)
    d = draw(B, T, dtype=dtype)
    chunked = {"chunk_size": chunk_size, "cu_seqlens": cu_seqlens}
    packed = {"cu_seqlens": cu_seqlens}
    rng = np.random.default_rng(1)
    n_seq = B if cu_seqlens is None else len(cu_seqlens) - 1
    initial = {"initial_state": rng.standard_normal((n_seq, 4, 24, 16)).astype(np.float32)}

    def check(name: str, arguments: tuple, **keywords: Any) -> Any:
        arguments = tuple(np.asarray(argument) for argument in arguments)
        got = getattr(gdn, name)(*arguments, **keywords)
        expected = getattr(oracle, name)(*arguments, **keywords)
        limit = {name: STAGE["float32"] for name in ("chunk_local_cumsum", "chunk_scaled_dot_kkt", "solve_tril")}
        pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
        for index, (one, reference) in enumerate(pairs):
            assert one.shape == reference.shape
            assert relative(one, reference) <= limit.get(name, STAGE[dtype]), (name, index)
            if not (name == "chunk_delta_h" and index == 0):
                assert not np.asarray(one)[~np.asarray(reference != 0)].any(), "a row without a token is not zero"
        return got

    g = check("chunk_local_cumsum", (d["g"],), **chunked)
    gate = {"g": np.asarray(g)} if gated else {}
    A = check("chunk_scaled_dot_kkt", (d["k"], d["beta"]), **gate, **chunked)
    inverse = check("solve_tril", (A,), **packed)
    w, u = check("recompute_w_u", (d["k"], d["v"], d["beta"], inverse), **gate, **packed)
    assert w.dtype == u.dtype == DTYPES[dtype]
    h, v_new, final = check("chunk_delta_h", (d["k"], w, u), **gate, **initial, **chunked)
    assert h.dtype == v_new.dtype == DTYPES[dtype] and final.dtype == jnp.float32
    o = check("chunk_o", (d["q"], d["k"], v_new, h), **gate, **chunked)
    assert o.dtype == DTYPES[dtype]


def test_options_of_the_stages():
    d = draw(1, 50)
    g = np.asarray(gdn.chunk_local_cumsum(d["g"]))
    A = np.asarray(gdn.chunk_scaled_dot_kkt(d["k"], d["beta"], g=g))
    inverse = gdn.solve_tril(A, out_dtype=jnp.bfloat16)
    assert inverse.dtype == jnp.bfloat16 and same(inverse, gdn.solve_tril(A).astype(jnp.bfloat16))
    # What is on the diagonal and above is not looked at.
    noise = np.triu(np.full((64, 64), np.nan, np.float32))
    rows = np.broadcast_to(noise[None, :50, None], A.shape)
    assert same(gdn.solve_tril(np.where(np.isnan(rows), rows, A)), gdn.solve_tril(A))

    h = np.random.default_rng(2).standard_normal((1, 1, 4, 24, 16)).astype(np.float32)
    options: dict[str, Any]
    for options in (
        {"gate_base": "2"},
        {"scale": 0.25},
        {"state_layout": "VK"},
        {"precision": "tf32"},
        {"gate_base": "2", "g": None},
    ):
        arguments = (d["q"], d["k"], d["v"], h.swapaxes(3, 4) if "state_layout" in options else h)
        keywords: dict[str, Any] = {"g": g} | options
        expected = oracle.chunk_o(*arguments, **{name: v for name, v in keywords.items() if name != "precision"})
        assert relative(gdn.chunk_o(*arguments, **keywords), expected) < STAGE["float32"], options
    # A state of another dtype is rounded to q's.
    half = gdn.chunk_o(*(d[name].astype(np.float16) for name in "qkv"), h, g=g)
    assert same(half, gdn.chunk_o(*(d[name].astype(np.float16) for name in "qkv"), h.astype(np.float16), g=g))


def combined(d: dict[str, Any], **keywords: Any):
    return gdn.chunk_gated_delta_rule(*(d[name] for name in ("q", "k", "v", "g", "beta")), **keywords)


def check_combined(d: dict[str, Any], dtype: str, few: float = 1.0, **keywords: Any) -> None:
    o, final = combined(d, return_final_state=True, **keywords)
    expected_o, expected_final = oracle.chunk_gated_delta_rule(**d, **keywords)
    assert o.dtype == DTYPES[dtype] and final is not None and final.dtype == jnp.float32
    assert relative(o, expected_o) <= few * COMBINED[dtype]
    assert relative(final, expected_final) <= few * COMBINED[dtype]
    assert not np.asarray(o)[expected_o == 0].any(), "a row without a token is not zero"


@pytest.mark.parametrize(
    ("dtype", "layout"), [*[("float32", layout) for layout in LAYOUTS], ("bfloat16", "packed"), ("float16", "dense")]
)
def test_combined(dtype: str, layout: str):
    B, T, cu_seqlens = bounds(layout)
    rng = np.random.default_rng(3)
    n_seq = B if cu_seqlens is None else len(cu_seqlens) - 1
    initial = rng.standard_normal((n_seq, 4, 24, 16)).astype(np.float32)
    d = draw(B, T, dtype=dtype)
    check_combined(d, dtype, cu_seqlens=cu_seqlens, chunk_size=16, scale=0.5)
    d["q"], d["k"] = (d[name] * np.asarray(3.0, d[name].dtype) for name in "qk")
    check_combined(d, dtype, cu_seqlens=cu_seqlens, initial_state=initial, use_qk_l2norm=True)


def test_combined_over_many_chunks_is_the_recurrence_in_both_precisions():
    d = draw(1, 600, H_k=1, H_v=2, K=16)
    for precision in ("ieee", "tf32"):
        o, final = combined(d, return_final_state=True, precision=precision)
        expected_o, expected_final = oracle.chunk_gated_delta_rule(**d)
        assert relative(o, expected_o) < 1e-5 and relative(final, expected_final) < 1e-5
    assert combined(d)[1] is None


@settings(max_examples=8, deadline=None)
@given(data=st.data(), seed=st.integers(0, 100))
def test_drawn_calls(data, seed: int):
    """Any sizes, also odd ones and heads that share keys."""
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    H_k = data.draw(st.integers(1, 2))
    sizes = {"H_k": H_k, "H_v": H_k * data.draw(st.integers(1, 2))}
    sizes |= {name: data.draw(st.integers(1, 20)) for name in ("K", "V")}
    keywords: dict[str, Any] = {"chunk_size": data.draw(st.sampled_from([16, 32, 64]))}
    B, T = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 70))
    n_seq = B
    if data.draw(st.booleans()):
        lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
        B, T, n_seq = 1, max(1, sum(lengths) + data.draw(st.integers(0, 3))), len(lengths)
        keywords["cu_seqlens"] = np.cumsum([0, *lengths]).astype(np.int32)
    if data.draw(st.booleans()):
        shape = (n_seq, sizes["H_v"], sizes["K"], sizes["V"])
        keywords["initial_state"] = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    keywords["use_qk_l2norm"] = data.draw(st.booleans())
    # Few elements: one unlucky rounding is much of the relative error.
    check_combined(draw(B, T, **sizes, dtype=dtype, seed=seed), dtype, few=8.0, **keywords)


def test_what_others_hold_does_not_matter():
    """NaN in other sequences and in padding reaches nothing, and a sequence's bits are its own wherever it stands."""
    layout = np.array([0, 20, 20, 90, 117], np.int32)
    d = draw(1, 120, dtype="bfloat16")
    initial = np.random.default_rng(4).standard_normal((4, 4, 24, 16)).astype(np.float32)
    clean_o, clean_final = combined(d, cu_seqlens=layout, initial_state=initial, return_final_state=True)
    for n in (0, 2, 3):
        begin, end = layout[n : n + 2]
        own = np.zeros(120, bool)
        own[begin:end] = True
        poisoned = {name: np.where(own.reshape(1, -1, *[1] * (a.ndim - 2)), a, np.nan) for name, a in d.items()}
        poisoned = {name: array.astype(d[name].dtype) for name, array in poisoned.items()}
        states = np.where(np.arange(4)[:, None, None, None] == n, initial, np.nan).astype(np.float32)
        o, final = combined(poisoned, cu_seqlens=layout, initial_state=states, return_final_state=True)
        assert final is not None and clean_final is not None
        assert same(o[0, begin:end], clean_o[0, begin:end]) and same(final[n], clean_final[n])
        assert not np.asarray(o[0, 117:]).any()

        # Elsewhere among others.
        length = end - begin
        moved = np.array([0, 7, 7 + length, 7 + length, 7 + length + 2], np.int32)
        elsewhere = draw(1, 120, dtype="bfloat16", seed=9)
        for name, array in d.items():
            elsewhere[name][0, 7 : 7 + length] = array[0, begin:end]
        states = initial[::-1].copy()
        states[1] = initial[n]
        o, final = combined(elsewhere, cu_seqlens=moved, initial_state=states, return_final_state=True)
        assert final is not None
        assert same(o[0, 7 : 7 + length], clean_o[0, begin:end]) and same(final[1], clean_final[n])


def test_a_sequence_without_tokens_keeps_its_state_whatever_it_holds():
    d = draw(1, 9)
    initial = np.zeros((3, 4, 24, 16), np.float32)
    initial[1] = np.inf
    _, final = combined(d, cu_seqlens=np.array([0, 4, 4, 9]), initial_state=initial, return_final_state=True)
    assert final is not None and same(final[1], initial[1]) and np.isfinite(np.asarray(final)[[0, 2]]).all()


def test_bounds_are_data():
    """Bounds that no check has seen (they were traced) touch nothing outside of the tokens."""
    d = draw(1, 40)
    call = jax.jit(lambda d, cu: combined(d, cu_seqlens=cu, return_final_state=True))
    for bad in ([-5, 10, 1000], [3, 2, 1], [50, 60, 70], [0, 2**31 - 1, -(2**31)]):
        o, final = call(d, jnp.array(bad, jnp.int32))
        assert np.isfinite(np.asarray(o)).all() and np.isfinite(np.asarray(final)).all()
    expected = combined(d, cu_seqlens=np.array([0, 10, 40]), return_final_state=True)
    assert all(same(a, b) for a, b in zip(call(d, jnp.array([-5, 10, 1000])), expected, strict=True))


@pytest.mark.parametrize("L", [16, 64, 128])
@pytest.mark.parametrize("likeness", [0.0, 0.9, 0.999, 1.0])
def test_inverse_of_what_is_hard_to_invert(L: int, likeness: float):
    """Keys nearly of one direction, written at full strength, without decay: no element is off by more than 1e-6 of 1.

    The powers of such triangles, whose sum the inverse is too, reach 10^17 for 64 rows.
    """
    rng = np.random.default_rng(5)
    k = rng.standard_normal((32, L, 64)) * np.sqrt(1 - likeness) + rng.standard_normal((32, 1, 64)) * np.sqrt(likeness)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = 1 - rng.uniform(0, 1e-3, (32, L, 1))
    g = np.cumsum(-rng.uniform(0, 1e-3, (32, L)), axis=1)
    A = (np.tril(k @ k.swapaxes(1, 2) * beta * np.exp(g[:, :, None] - g[:, None]), -1)).astype(np.float32)
    expected = np.linalg.inv(np.eye(L) + A.astype(np.float64))
    worst = np.abs(np.asarray(invert(jnp.asarray(A)), np.float64) - expected).max()
    assert worst < 2e-6 * np.abs(expected).max()


def test_inverse_of_what_grows():
    """Gates that grow and keys of alternating sign: entries of 10^3 and more, each right to its own row's scale."""
    rng = np.random.default_rng(6)
    A = np.tril(rng.standard_normal((16, 64, 64)) * 0.4, -1).astype(np.float32)
    expected = np.linalg.inv(np.eye(64) + A.astype(np.float64))
    assert error(np.asarray(invert(jnp.asarray(A))), expected).within(1e-5, 1e-5)


RECURRENT: dict[str, dict[str, Any]] = {
    "a token each": {},
    "slots": {"state_indices": np.array([4, -1, 0, 2]), "null_slot": 2},
    "to other slots": {"state_indices": np.array([4, 1, 0, 2]), "dst_state_indices": np.array([3, 5, -1, 6])},
    "packed": {"cu_seqlens": np.array([0, 3, 3, 5, 6]), "state_indices": np.array([4, 1, 0, 2])},
    "packed, by place": {"cu_seqlens": np.array([0, 3, 3, 5, 6])},
    "speculative": {
        "cu_seqlens": np.array([0, 3, 3, 5, 6]),
        "state_indices": np.array([[4, 1], [5, 6], [0, 2], [-1, 3]]),
        "num_accepted_tokens": np.array([2, 1, 0, 9]),
    },
}  # fmt: skip


def recurrent(form: str, dtype: str = "float32", state_dtype: str = "float32", **more: Any):
    keywords = {name: np.asarray(a, np.int32) if name != "null_slot" else a for name, a in RECURRENT[form].items()}
    T = 7 if "cu_seqlens" in keywords else 4
    d = draw(1, T, dtype=dtype)
    state = np.random.default_rng(7).standard_normal((8, 4, 24, 16)).astype(DTYPES[state_dtype])
    arguments = (*(d[name][0] for name in ("q", "k", "v", "g", "beta")), state)
    return arguments, keywords | more


def check_recurrent(arguments, keywords, limit: float, state_limit: float):
    o, state = gdn.fused_recurrent_gated_delta_rule(*arguments, **keywords)
    expected_o, expected_state = oracle.fused_recurrent_gated_delta_rule(*arguments, **keywords)
    assert o.dtype == arguments[2].dtype and state.dtype == arguments[5].dtype
    assert relative(o, expected_o) <= limit and relative(state, expected_state) <= state_limit
    assert not np.asarray(o)[expected_o == 0].any()
    untouched = [s for s in range(8) if np.array_equal(expected_state[s], arguments[5][s].astype(np.float64))]
    assert all(same(state[s], arguments[5][s]) for s in untouched)


@pytest.mark.parametrize("form", RECURRENT)
def test_recurrent(form: str):
    check_recurrent(*recurrent(form, "bfloat16", "bfloat16", scale=0.3), 4e-3, 4e-3)
    gates = np.random.default_rng(8).standard_normal((2, 4)).astype(np.float32)
    inside = {"A_log": gates[0], "dt_bias": gates[1], "sigmoid_beta": True, "use_qk_l2norm": True}
    check_recurrent(*recurrent(form, **inside), 1e-6, 1e-6)


def test_recurrent_continues_what_chunks_began():
    d = draw(1, 70)
    o, final = combined(d, return_final_state=True)
    _, state = combined({name: array[:, :69] for name, array in d.items()}, return_final_state=True)
    last = (d[name][0, 69:] for name in ("q", "k", "v", "g", "beta"))
    next_o, next_state = gdn.fused_recurrent_gated_delta_rule(*last, state)
    assert final is not None
    assert relative(next_o[0], np.asarray(o[0, 69], np.float64)) < 1e-6
    assert relative(next_state[0], np.asarray(final[0], np.float64)) < 1e-6


def test_slots_past_the_pool_are_seen_where_they_can_be_and_nan_where_not():
    arguments, keywords = recurrent("slots")
    keywords["state_indices"][0] = 8
    with pytest.raises(ValueError, match=r"state_indices: expected slots < S=8, got 8"):
        gdn.fused_recurrent_gated_delta_rule(*arguments, **keywords)
    slots = keywords.pop("state_indices")
    o, state = jax.jit(lambda slots: gdn.fused_recurrent_gated_delta_rule(*arguments, state_indices=slots))(slots)
    assert np.isnan(np.asarray(o[0])).all() and np.isfinite(np.asarray(o[2:])).all()
    assert same(np.delete(np.asarray(state), [0, 2], 0), np.delete(arguments[5], [0, 2], 0))
