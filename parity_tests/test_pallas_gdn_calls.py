"""Around the gated delta rule of `pallas_ssm`: gradients, transformations, compiles, errors and the choice of what runs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_ssm.gdn

from .interpret_mosaic import interpreted
from .oracle import gdn as oracle
from .test_pallas_gdn import combined, draw, recurrent, relative, same

gdn: Any = pallas_ssm.gdn  # NumPy's arrays are as good as JAX's
PACKED = np.array([0, 20, 20, 37, 40], np.int32)
SIZES: dict[str, Any] = {"H_k": 1, "H_v": 2, "K": 8, "V": 6}


def states(n_seq: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n_seq, 2, 8, 6)).astype(np.float32)


def stage_arguments(cu_seqlens) -> dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """(float arguments, other keywords) of every stage, as the oracle's stages make them."""
    d = draw(1, 43, **SIZES)
    packed = {"cu_seqlens": cu_seqlens}
    g = oracle.chunk_local_cumsum(d["g"], chunk_size=16, **packed)
    A = oracle.chunk_scaled_dot_kkt(d["k"], d["beta"], g=g, chunk_size=16, **packed)
    inverse = oracle.solve_tril(A, **packed)
    w, u = oracle.recompute_w_u(d["k"], d["v"], d["beta"], inverse, g=g, **packed)
    n_seq = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    h, v_new, _ = oracle.chunk_delta_h(d["k"], w, u, g=g, initial_state=states(n_seq), chunk_size=16, **packed)
    chunked = packed | {"chunk_size": 16}
    calls = {
        "chunk_local_cumsum": ({"g": d["g"]}, chunked),
        "chunk_scaled_dot_kkt": ({"k": d["k"], "beta": d["beta"], "g": g}, chunked),
        "solve_tril": ({"A": A}, packed),
        "recompute_w_u": ({"k": d["k"], "v": d["v"], "beta": d["beta"], "A": inverse, "g": g}, packed),
        "chunk_delta_h": ({"k": d["k"], "w": w, "u": u, "g": g, "initial_state": states(n_seq)}, chunked),
        "chunk_o": ({"q": d["q"], "k": d["k"], "v": v_new, "h": np.nan_to_num(h), "g": g}, chunked | {"gate_base": "2"}),
    }  # fmt: skip
    return {
        name: ({n: a.astype(np.float32) for n, a in floats.items()}, rest) for name, (floats, rest) in calls.items()
    }


def problem(form: str) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """(function, float arguments by name, the others)."""
    name, _, layout = form.partition(", ")
    cu_seqlens = PACKED if layout == "packed" else None
    if name == "chunk_gated_delta_rule":
        B = 1 if layout == "packed" else 2
        d = draw(B, 43, **SIZES)
        n_seq = len(PACKED) - 1 if layout == "packed" else B
        others = {"cu_seqlens": cu_seqlens, "use_qk_l2norm": True, "chunk_size": 16, "return_final_state": True}
        return name, d | {"initial_state": states(n_seq)}, others
    if name == "fused_recurrent_gated_delta_rule":
        arguments, keywords = recurrent(layout)
        floats = dict(zip(("q", "k", "v", "g", "beta", "state"), arguments, strict=True))
        gates = np.random.default_rng(8).standard_normal((2, 4)).astype(np.float32)
        others = keywords | {"sigmoid_beta": True, "use_qk_l2norm": True}
        return name, floats | {"A_log": gates[0], "dt_bias": gates[1]}, others
    return name, *stage_arguments(cu_seqlens)[name]


FORMS = [
    "chunk_gated_delta_rule, dense",
    "chunk_gated_delta_rule, packed",
    "chunk_local_cumsum, packed",
    "chunk_scaled_dot_kkt, packed",
    "solve_tril, packed",
    "recompute_w_u, packed",
    "chunk_delta_h, dense",
    "chunk_delta_h, packed",
    "chunk_o, packed",
    "fused_recurrent_gated_delta_rule, slots",
    "fused_recurrent_gated_delta_rule, speculative",
]


def weighted(results: Any, weights: list[Any]) -> Any:
    return sum((result * weight).sum() for result, weight in zip(jax.tree.leaves(results), weights, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_every_float_argument_against_finite_differences_of_the_oracle(form: str):
    name, floats, others = problem(form)
    in_oracle = {n: v for n, v in others.items() if n != "return_final_state"}
    rng = np.random.default_rng(2)
    expected = jax.tree.leaves(getattr(oracle, name)(**floats, **in_oracle))
    # Slots without a chunk have no meaning.
    weights = [np.where(np.isnan(result), 0.0, rng.standard_normal(result.shape)) for result in expected]

    def loss(floats):
        return weighted(getattr(gdn, name)(**floats, **others), [w.astype(np.float32) for w in weights])

    def oracle_loss(floats):
        return weighted(
            [np.nan_to_num(r) for r in jax.tree.leaves(getattr(oracle, name)(**floats, **in_oracle))], weights
        )

    got = jax.jit(jax.grad(loss))(floats)
    exact = {n: array.astype(np.float64) for n, array in floats.items()}
    for n, array in exact.items():
        direction = rng.standard_normal(array.shape)
        ahead, behind = (oracle_loss(exact | {n: array + h * direction}) for h in (1e-5, -1e-5))
        # The sum along a direction cancels; what was summed is the measure of its error.
        summed = np.asarray(got[n], np.float64) * direction
        assert abs(summed.sum() - (ahead - behind) / 2e-5) < 4e-6 * np.abs(summed).sum(), n


@pytest.mark.parametrize("form", ["chunk_gated_delta_rule, packed", "chunk_delta_h, packed", "chunk_o, packed"])
def test_what_padding_and_others_hold_reaches_no_gradient(form: str):
    name, floats, others = problem(form)
    token = next(array.shape[1] for array in floats.values())
    kept = np.arange(token) < PACKED[1]

    def gradients(floats):
        def loss(floats):
            o = jax.tree.leaves(getattr(gdn, name)(**floats, **others))
            return sum(jnp.where(kept[:, None, None], x[0], 0).sum() for x in o if x.shape[:2] == (1, token))

        return jax.jit(jax.grad(loss))(floats)

    poisoned = {n: array.copy() for n, array in floats.items()}
    for n, array in poisoned.items():
        if n == "initial_state":
            array[1:] = np.nan
        elif n == "h":
            array[:, 2:] = np.nan
        else:
            array[:, ~kept] = np.nan
    clean, found = gradients(floats), gradients(poisoned)
    for n, array in found.items():
        own = np.s_[:, :2] if n == "h" else np.s_[:1] if n == "initial_state" else np.s_[:, : PACKED[1]]
        assert same(np.asarray(array)[own], np.asarray(clean[n])[own]), n
        # And none from the tokens past the last sequence, whatever the others have done to themselves.
        if n not in ("h", "initial_state"):
            assert not np.asarray(array)[:, PACKED[-1] :].any(), n


def test_vmap_scan_remat():
    d = draw(2, 40, **SIZES)
    rows = {n: array[:, None] for n, array in d.items()}
    o, final = jax.vmap(lambda d: combined(d, return_final_state=True))(rows)
    by_row, by_row_final = combined(d, return_final_state=True)
    assert relative(o[:, 0], np.asarray(by_row, np.float64)) < 1e-6
    assert relative(final[:, 0], np.asarray(by_row_final, np.float64)) < 1e-6

    # Packed, each row by its own bounds.
    bounds = jnp.array([[0, 10, 40], [0, 33, 39]])
    o, final = jax.vmap(lambda d, cu: combined(d, cu_seqlens=cu, return_final_state=True))(rows, bounds)
    for b in range(2):
        one = {n: array[b] for n, array in rows.items()}
        expected_o, expected_final = combined(one, cu_seqlens=bounds[b], return_final_state=True)
        assert relative(o[b], np.asarray(expected_o, np.float64)) < 1e-6
        assert relative(final[b], np.asarray(expected_final, np.float64)) < 1e-6

    # A sequence in pieces, the state going from one to the next; with and without remat.
    @jax.checkpoint
    def piece(state, d):
        o, state = combined(d, initial_state=state, return_final_state=True)
        return state, o

    def total(d, step):
        pieces = {n: jnp.moveaxis(array.reshape(2, 4, 10, *array.shape[2:]), 1, 0) for n, array in d.items()}
        state, o = jax.lax.scan(step, jnp.zeros((2, 2, 8, 6)), pieces)
        return (o**2).sum(), (state, jnp.moveaxis(o, 0, 1).reshape(d["v"].shape))

    (_, (state, o)), gradient = jax.jit(jax.value_and_grad(lambda d: total(d, piece), has_aux=True))(d)
    assert relative(o, np.asarray(by_row, np.float64)) < 1e-5
    assert relative(state, np.asarray(by_row_final, np.float64)) < 1e-5
    whole = jax.jit(jax.grad(lambda d: (combined(d)[0] ** 2).sum()))(d)
    for n in d:
        assert relative(gradient[n], np.asarray(whole[n], np.float64)) < 1e-5, n


def test_vmap_of_decode():
    arguments, keywords = recurrent("packed")
    batch = [np.stack([array, 2 * array]) for array in arguments]
    o, state = jax.vmap(lambda *a: gdn.fused_recurrent_gated_delta_rule(*a, **keywords))(*batch)
    expected_o, expected_state = gdn.fused_recurrent_gated_delta_rule(*(array[1] for array in batch), **keywords)
    assert relative(o[1], np.asarray(expected_o, np.float64)) < 1e-6
    assert relative(state[1], np.asarray(expected_state, np.float64)) < 1e-6


def test_one_program_serves_every_packing():
    d = draw(1, 64, **SIZES)
    traced = 0

    @jax.jit
    def run(d, cu_seqlens):
        nonlocal traced
        traced += 1
        return combined(d, cu_seqlens=cu_seqlens, return_final_state=True)

    rng = np.random.default_rng(3)
    for _ in range(50):
        inner = np.sort(rng.integers(0, 65, 3))
        o, _ = run(d, np.array([0, *inner, rng.integers(inner[-1], 65)], np.int32))
        assert np.isfinite(np.asarray(o)).all()
    assert traced == 1


def test_decode_holds_no_copy_of_a_donated_state():
    arguments, keywords = recurrent("slots")
    keywords.pop("null_slot")

    def step(state, *others, **indices):
        return gdn.fused_recurrent_gated_delta_rule(*others, state, **indices)

    *others, state = arguments
    compiled: Any = jax.jit(step, donate_argnums=0).lower(state, *others, **keywords).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == state.nbytes


EMPTY = {
    "no rows": (0, 5, None),
    "no tokens": (2, 0, None),
    "no sequence": (1, 5, [0]),
    "nothing packed": (1, 0, [0, 0, 0]),
}


@pytest.mark.parametrize("form", EMPTY)
def test_calls_without_tokens(form: str):
    B, T, bounds = EMPTY[form]
    cu_seqlens = None if bounds is None else np.array(bounds, np.int32)
    n_seq = B if bounds is None else len(bounds) - 1
    NC = -(-T // 64) if bounds is None else T // 64 + n_seq
    q = k = np.zeros((B, T, 2, 8), np.float32)
    v, w, g = np.ones((B, T, 4, 6), np.float32), np.ones((B, T, 4, 8), np.float32), np.ones((B, T, 4), np.float32)
    A, h, initial = np.ones((B, T, 4, 64), np.float32), np.ones((B, NC, 4, 8, 6), np.float32), np.ones((n_seq, 4, 8, 6))
    initial = initial.astype(np.float32)
    packed = {"cu_seqlens": cu_seqlens}
    for got, shape in (
        (gdn.chunk_local_cumsum(g, **packed), g.shape),
        (gdn.chunk_scaled_dot_kkt(k, g, **packed), A.shape),
        (gdn.solve_tril(A, **packed), A.shape),
        (gdn.recompute_w_u(k, v, g, A, **packed)[0], w.shape),
        (gdn.recompute_w_u(k, v, g, A, **packed)[1], v.shape),
        (gdn.chunk_delta_h(k, w, v, **packed)[0], h.shape),
        (gdn.chunk_delta_h(k, w, v, **packed)[1], v.shape),
        (gdn.chunk_o(q, k, v, h, **packed), v.shape),
        (gdn.chunk_gated_delta_rule(q, k, v, g, g, **packed)[0], v.shape),
    ):
        assert got.shape == shape and not np.asarray(got).any()
    assert same(gdn.chunk_delta_h(k, w, v, initial_state=initial, **packed)[2], initial)
    keywords = packed | {"return_final_state": True}
    assert same(gdn.chunk_gated_delta_rule(q, k, v, g, g, initial_state=initial, **keywords)[1], initial)
    assert same(gdn.chunk_gated_delta_rule(q, k, v, g, g, **keywords)[1], 0 * initial)


ERRORS = [
    ({"q": None}, TypeError, "q: expected an array, got None"),
    ({"k": [1.0]}, TypeError, "k: expected an array, got list"),
    ({"q": np.zeros((2, 40, 1, 7), np.float32)}, ValueError, r"q: expected shape \(B=2, T=40, H_k=1, K=8\)"),
    ({"v": np.zeros((2, 40, 2, 6), np.float16)}, TypeError, "v: expected the dtype of k, float32, got float16"),
    ({"beta": np.zeros((2, 40, 3), np.float32)}, ValueError, r"beta: expected shape \(B=2, T=40, H_v=2\)"),
    ({"g": np.zeros((2, 40, 2), np.int32)}, TypeError, "g: expected dtype float32 or bfloat16 or float16, got int32"),
    ({"cu_seqlens": np.array([0, 40])}, ValueError, "k: expected B=1 with cu_seqlens"),
    ({"initial_state": np.zeros((1, 2, 8, 6), np.float32)}, ValueError, "initial_state: expected shape"),
    ({"chunk_size": 48}, ValueError, "chunk_size: expected a power of two from 16 to 64, got 48"),
    ({"chunk_size": 16.0}, TypeError, "chunk_size: expected an int, got float"),
    ({"scale": "1"}, TypeError, "scale: expected a float or None, got str"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
    ({"scale": 10**400}, ValueError, "scale: expected a finite number, got inf"),
    ({"use_qk_l2norm": 1}, TypeError, "use_qk_l2norm: expected a bool, got int"),
    ({"return_final_state": None}, TypeError, "return_final_state: expected a bool"),
    ({"precision": "bf16"}, ValueError, "precision: expected 'ieee' or 'tf32', got 'bf16'"),
    ({"implementation": "triton"}, ValueError, "implementation: expected one of"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[next(iter(error[0])) for error in ERRORS])
def test_errors(change: dict[str, Any], kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        gdn.chunk_gated_delta_rule(**(draw(2, 40, **SIZES) | change))


def test_errors_of_the_stages_and_of_decode():
    d = draw(1, 40, **SIZES)
    g, A = d["g"], np.zeros((1, 40, 2, 64), np.float32)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected 0 <= … <= T=40 without a descent"):
        gdn.chunk_local_cumsum(g, cu_seqlens=np.array([0, 9, 8]))
    with pytest.raises(TypeError, match="g: expected dtype float32, got float16"):
        gdn.chunk_scaled_dot_kkt(d["k"], d["beta"], g=g.astype(np.float16))
    with pytest.raises(TypeError, match="out_dtype: expected dtype float32 or bfloat16 or float16, got int32"):
        gdn.solve_tril(A, out_dtype=jnp.int32)
    with pytest.raises(TypeError, match="out_dtype: expected a dtype, got 'half a float'"):
        gdn.solve_tril(A, out_dtype="half a float")
    with pytest.raises(ValueError, match=r"A: expected shape|chunk_size: expected"):
        gdn.recompute_w_u(d["k"], d["v"], d["beta"], A[..., :40])
    with pytest.raises(ValueError, match="gate_base: expected 'e' or '2', got '10'"):
        gdn.chunk_o(d["q"], d["k"], d["v"], np.zeros((1, 1, 2, 8, 6), np.float32), gate_base="10")
    with pytest.raises(ValueError, match=r"h: expected shape \(B=1, NC=1, H_v=2, V=6, K=8\)"):
        gdn.chunk_o(d["q"], d["k"], d["v"], np.zeros((1, 1, 2, 8, 6), np.float32), state_layout="VK")
    arguments, _ = recurrent("a token each")
    with pytest.raises(ValueError, match="dt_bias: expected None without A_log"):
        gdn.fused_recurrent_gated_delta_rule(*arguments, dt_bias=np.zeros(4, np.float32))
    with pytest.raises(TypeError, match="sigmoid_beta: expected a bool"):
        gdn.fused_recurrent_gated_delta_rule(*arguments, sigmoid_beta=0)


def test_what_has_no_kernel_says_so():
    g = draw(1, 64, H_k=1, H_v=1, K=128, V=128, dtype="bfloat16")["g"]
    name = "gdn.chunk_local_cumsum"
    with pytest.raises(NotImplementedError, match=f"{name}: the mosaic_gpu kernel does not run on a CPU outside"):
        gdn.chunk_local_cumsum(g, implementation="mosaic_gpu")
    with interpreted():
        with pytest.raises(NotImplementedError, match=f"{name}: there is no mosaic_gpu kernel of this operator"):
            gdn.chunk_local_cumsum(g, implementation="mosaic_gpu")
        by_default = gdn.chunk_local_cumsum(g)
    assert same(by_default, gdn.chunk_local_cumsum(g, implementation="xla"))
