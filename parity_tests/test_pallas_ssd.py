"""The XLA form of `pallas_ssm`'s SSD operators: values against the oracle, and what no value may depend on.

The registry's cases are in test_twins.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_ssm
from pallas_ssm.ssd import _xla, _xla_stages
from pallas_ssm.ssd._xla_chunks import packed

from .cases import SSD_STAGES, Case
from .compare import against_oracle
from .inputs import DTYPES, draw
from .operators import OPERATORS, oracle_results
from .runners import jax_runner

COMBINED = "mamba_chunk_scan_combined"
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


def forget() -> None:
    """What was compiled with other constants."""
    compiled: Any = _xla.combined
    compiled.clear_cache()


def check(case: Case, seed: int = 0, few: bool = False) -> None:
    """`few`: so few elements that one unlucky rounding is the whole relative error, not an average over many."""
    arguments, keywords = draw(case, seed)
    result = jax_runner(OPERATORS[case.op], None, False, implementation="xla")(arguments, keywords)
    for comparison in against_oracle(case, arguments, keywords, result, oracle_results(case, arguments, keywords)):
        worst = comparison.error.within(comparison.worst, comparison.worst)
        assert comparison.ok or (few and not comparison.note and worst), (comparison, case)


@st.composite
def drawn(draw_from, op: str) -> Case:
    options = draw_from(
        st.fixed_dictionaries(
            {
                "D": st.booleans(),
                "D_per_headdim": st.booleans(),
                "z": st.booleans(),
                "initial": st.booleans(),
                "slow": st.booleans(),
                "chunk_aligned": st.booleans() if op == COMBINED else st.just(False),
                "return_intermediate_states": st.booleans() if op == COMBINED else st.just(False),
            }
        )
    )
    B, T = draw_from(st.integers(1, 2)), draw_from(st.integers(1, 40))
    if draw_from(st.booleans()):
        lengths = draw_from(st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any))
        options |= {"lengths": tuple(lengths), "tail": draw_from(st.integers(0, 3))}
        options["poison"] = op == COMBINED and not options["chunk_aligned"]
        B, T = 1, sum(lengths) + options["tail"]
    H, G = draw_from(st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]))
    P, N, L = draw_from(st.integers(1, 9)), draw_from(st.integers(1, 9)), draw_from(st.sampled_from([16, 32]))
    dims = {"B": B, "T": T, "H": H, "G": G, "P": P, "N": N, "L": L}
    return Case(op, "drawn", dims, draw_from(st.sampled_from(sorted(DTYPES))), "float32", options)


@settings(max_examples=12, deadline=None)
@given(case=drawn(COMBINED), seed=st.integers(0, 100), chunk=st.sampled_from([16, 64, 128]), at_once=st.integers(1, 5))
def test_drawn_whole_operator(case: Case, seed: int, chunk: int, at_once: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_xla, "_CHUNK", chunk)
        patch.setattr(_xla_stages, "_MAX_CHUNKS", at_once)
        forget()
        check(case, seed, few=True)
    forget()


@settings(max_examples=12, deadline=None)
@given(case=st.sampled_from(SSD_STAGES).flatmap(drawn), seed=st.integers(0, 100))
def test_drawn_stages(case: Case, seed: int):
    check(case, seed, few=True)


def problem(lengths: tuple[int, ...] | None = (21, 0, 5, 33), tail: int = 3, L: int = 16, **options: Any):
    """(array arguments by name, other arguments)."""
    T = sum(lengths) + tail if lengths else 50
    dims = {"B": 1 if lengths else 2, "T": T, "H": 4, "G": 2, "P": 8, "N": 8, "L": L}
    options = {"D": True, "z": True, "initial": True, "slow": True} | options
    if lengths:
        options |= {"lengths": lengths, "tail": tail}
    arguments, keywords = draw(Case(COMBINED, "problem", dims, options.pop("dtype", "float32"), "float32", options))
    named = dict(zip(("x", "dt", "A", "B", "C"), arguments, strict=True)) | keywords
    arrays = {name: jnp.asarray(value) for name, value in named.items() if isinstance(value, np.ndarray)}
    return arrays, {name: value for name, value in named.items() if name not in arrays}


def call(arrays: dict[str, Any], others: dict[str, Any], **more: Any) -> Any:
    return pallas_ssm.mamba_chunk_scan_combined(**arrays, **others, **more, implementation="xla")


def same(first: Any, second: Any) -> bool:
    return np.asarray(first).tobytes() == np.asarray(second).tobytes()


def reordered(arrays: dict[str, jax.Array], lengths: tuple[int, ...], order: tuple[int, ...]):
    """The sequences in another order, as far as tokens and initial states go."""
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.concatenate([np.arange(bounds[n], bounds[n + 1]) for n in order])
    rows = np.concatenate([rows, np.arange(bounds[-1], arrays["x"].shape[1])]).astype(int)
    moved = {name: arrays[name][:, rows] for name in ("x", "dt", "B", "C", "z")}
    moved["initial_states"] = arrays["initial_states"][jnp.array(order)]
    moved["cu_seqlens"] = jnp.asarray(np.concatenate([[0], np.cumsum(np.array(lengths)[list(order)])]), jnp.int32)
    return arrays | moved, rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_has_the_same_bits_whatever_else_is_packed(dtype):
    lengths, order = (21, 0, 5, 33), (3, 1, 0, 2)
    arrays, others = problem(lengths, dtype=dtype)
    moved, rows = reordered(arrays, lengths, order)
    y, final = call(arrays, others)
    moved_y, moved_final = call(moved, others)
    assert same(moved_y, y[:, rows]) and same(moved_final, final[jnp.array(order)])


@pytest.mark.parametrize("gone", [0, 2, 3, None])
def test_nan_stays_in_its_own_sequence(gone):
    """`gone`: the sequence that holds NaN; None for the padding."""
    lengths = (21, 0, 5, 33)
    arrays, others = problem(lengths, return_intermediate_states=True)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    begin, end = (bounds[-1], 62) if gone is None else (bounds[gone], bounds[gone + 1])
    bad = {name: arrays[name].at[:, begin:end].set(jnp.nan) for name in ("x", "dt", "B", "C", "z")}
    if gone is not None:
        bad["initial_states"] = arrays["initial_states"].at[gone].set(jnp.inf)
    (y, final, after), (bad_y, bad_final, bad_after) = call(arrays, others), call(arrays | bad, others)
    others_rows = np.setdiff1d(np.arange(59), np.arange(begin, end))
    assert same(bad_y[:, others_rows], y[:, others_rows]) and not y[:, 59:].any() and not bad_y[:, 59:].any()
    others_n = np.setdiff1d(np.arange(4), [] if gone is None else [gone])
    assert same(bad_final[others_n], final[others_n])
    slots = {n: slice(bounds[n] // 16 + n, bounds[n] // 16 + n - (-lengths[n] // 16)) for n in (0, 2, 3)}
    assert all(same(bad_after[:, slots[n]], after[:, slots[n]]) for n in slots if n != gone)
    assert gone is None or np.isnan(bad_y[:, begin:end]).all()


def test_a_sequence_resumes_at_a_chunk_from_its_state():
    arrays, others = problem(None)
    y, final = call(arrays, others)
    head = {name: array[:, :32] for name, array in arrays.items() if name in ("x", "dt", "B", "C", "z")}
    rest = {name: array[:, 32:] for name, array in arrays.items() if name in ("x", "dt", "B", "C", "z")}
    head_y, state = call(arrays | head, others)
    rest_y, rest_final = call(arrays | rest | {"initial_states": state}, others)
    np.testing.assert_allclose(jnp.concatenate([head_y, rest_y], axis=1), y, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(rest_final, final, rtol=2e-5, atol=2e-6)


def test_sequences_without_tokens_keep_their_states():
    arrays, others = problem((0, 5, 0, 0, 11, 0), tail=0)
    _, final = call(arrays, others)
    empty = jnp.array([0, 2, 3, 5])
    assert same(final[empty], arrays["initial_states"][empty])
    del arrays["initial_states"]
    _, final = call(arrays, others)
    assert not final[empty].any() and final[jnp.array([1, 4])].any()


def test_nobody_and_nothing():
    arrays, others = problem((0, 0), tail=5)
    y, final = call(arrays, others)
    assert not y.any() and same(final, arrays["initial_states"])
    nobody = {"cu_seqlens": jnp.zeros(1, jnp.int32), "initial_states": arrays["initial_states"][:0]}
    y, final, after = call(arrays | nobody, others, return_intermediate_states=True)
    assert y.shape == (1, 5, 4, 8) and not y.any() and final.shape == (0, 4, 8, 8) and after.shape == (1, 0, 4, 8, 8)
    nothing = {name: arrays[name][:, :0] for name in ("x", "dt", "B", "C", "z")}
    y, final, after = call(arrays | nothing, others, return_intermediate_states=True)
    assert y.shape == (1, 0, 4, 8) and same(final, arrays["initial_states"]) and after.shape == (1, 2, 4, 8, 8)
    dense = {name: array for name, array in (arrays | nothing).items() if name not in ("cu_seqlens", "initial_states")}
    y, final = call(dense, others)
    assert y.shape == (1, 0, 4, 8) and not final.any() and final.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("op", SSD_STAGES)
def test_stages_of_nothing(op):
    """No batch row, where there may be one; else no token."""
    case = Case(op, "nothing", {"B": 1, "T": 1, "H": 2, "G": 1, "P": 4, "N": 4, "L": 16}, "float32", "float32")
    arguments, keywords = draw(case)
    if op in ("ssd.chunk_cumsum", "ssd.bmm_chunk"):
        arguments = tuple(array[:, :0] if array.ndim > 1 else array for array in arguments)
    else:
        arguments = tuple(array[:0] for array in arguments)
    function = OPERATORS[op].function(pallas_ssm, keywords)
    for array in jax.tree.leaves(function(*arguments, **keywords, implementation="xla")):
        assert array.size == 0


def test_bounds_out_of_range_are_clamped():
    arrays, others = problem()
    wild, tame = jnp.array([-5, 30, 30, 999, 2**31 - 1], jnp.int32), jnp.array([0, 30, 30, 62, 62], jnp.int32)
    # Concrete bounds on the host are checked; these are not concrete.
    run = jax.jit(lambda bounds: call(arrays | {"cu_seqlens": bounds}, others))
    assert all(same(a, b) for a, b in zip(run(wild), run(tame), strict=True))
    with jax.enable_x64(True):
        wide = jnp.array([0, 30, 30, 2**40, 2**40], jnp.int64)
        assert same(run(wide)[0], run(tame)[0])


def test_one_program_serves_every_packing():
    arrays, others = problem()
    traced = []

    @jax.jit
    def run(arrays):
        traced.append(1)
        return call(arrays, others)

    rng = np.random.default_rng(0)
    for _ in range(50):
        bounds = np.sort(rng.integers(0, 63, 5))
        bounds[0] = 0
        jax.block_until_ready(run(arrays | {"cu_seqlens": jnp.asarray(bounds, jnp.int32)}))
    assert len(traced) == 1


def test_it_works_inside_scan_and_remat():
    arrays, others = problem(None)
    del arrays["z"], arrays["initial_states"]
    expected, state = arrays["x"], jnp.zeros((2, 4, 8, 8))
    for _ in range(2):
        expected, state = call(arrays | {"x": expected, "initial_states": state}, others)

    def layer(carry, _):
        return jax.checkpoint(lambda x, state: call(arrays | {"x": x, "initial_states": state}, others))(*carry), None

    (got, _), _ = jax.jit(lambda x: jax.lax.scan(layer, (x, jnp.zeros((2, 4, 8, 8))), length=2))(arrays["x"])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_nothing_grows_with_the_square_of_the_chunks():
    """Temporary memory of a long sequence: twice the tokens take about twice as much."""
    shape = jax.ShapeDtypeStruct

    def temporary(T: int) -> int:
        x, dt, B = shape((1, T, 2, 8), jnp.float32), shape((1, T, 2), jnp.float32), shape((1, T, 1, 8), jnp.float32)
        A = shape((2,), jnp.float32)
        run = jax.jit(lambda x, dt, A, B: call({"x": x, "dt": dt, "A": A, "B": B, "C": B}, {"chunk_size": 64}))
        analysis: Any = run.lower(x, dt, A, B).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert temporary(1 << 14) < 2.5 * temporary(1 << 13)


def test_every_place_is_read_once():
    """Both directions' indices, where there is something to read, are each other's inverse."""
    bounds = jnp.array([0, 21, 21, 26, 59], jnp.int32)
    for L, outer, aligned in ((16, 16, False), (16, 64, True), (64, 16, True)):
        chunks = packed(62, L, 4, bounds, outer=outer, aligned=aligned)
        assert chunks.packing is not None and chunks.there is not None
        tokens = np.asarray(chunks.packing.token).ravel()
        assert len(set(tokens)) == tokens.size
        assert sorted(tokens[tokens < 62]) == list(range(59))
        place = np.asarray(chunks.packing.place)
        assert (tokens[place[:59]] == np.arange(59)).all() and (place[59:] >= chunks.S * L).all()
        rows = np.asarray(chunks.packing.row).ravel()
        assert len(set(rows)) == rows.size
        assert np.asarray(chunks.slots.first).sum() == 4 and len(set(np.asarray(chunks.last))) == 4
        if L <= outer:
            ends = np.asarray(chunks.slots.outer)[np.asarray(chunks.slots.ends)]
            assert len(set(ends)) == ends.size == sum(-(-length // outer) for length in (21, 0, 5, 33))


@pytest.mark.parametrize("lengths", [None, (21, 0, 5, 33)])
def test_blocks_of_chunks_do_not_show(lengths, monkeypatch):
    """However many chunks are worked on at once: results and gradients."""
    arrays, others = problem(lengths, return_intermediate_states=True, D_per_headdim=True)
    floats = {name: array for name, array in arrays.items() if name != "cu_seqlens"}

    def run():
        forget()
        results = call(arrays, others)
        # Slots without a chunk have no meaning, and no gradient either.
        return results[:2], jax.grad(lambda floats: sum(a.sum() for a in call(arrays | floats, others)[:2]))(floats)

    expected = run()
    monkeypatch.setattr(_xla_stages, "_MAX_CHUNKS", 3)
    monkeypatch.setattr(_xla_stages, "_TOGETHER", 2)
    got = run()
    forget()
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
