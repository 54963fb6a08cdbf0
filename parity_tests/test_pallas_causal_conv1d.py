"""`pallas_ssm`'s convolutions against the oracle: the XLA form, and the kernels interpreted with race detection on.

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
from pallas_ssm._causal_conv1d_launch import PREFILL, UPDATE
from ssm_configs import override

from .cases import Case
from .compare import against_oracle
from .inputs import DTYPES, draw
from .interpret_mosaic import interpreted
from .operators import OPERATORS, oracle_results
from .runners import jax_runner

BOTH = pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


def check(case: Case, implementation: str, seed: int = 0, few: bool = False) -> None:
    """`few`: so few elements that one unlucky rounding is the whole relative error, not an average over many."""
    arguments, keywords = draw(case, seed)
    run = jax_runner(OPERATORS[case.op], None, implementation == "mosaic_gpu", implementation=implementation)
    result = run(arguments, keywords)
    for comparison in against_oracle(case, arguments, keywords, result, oracle_results(case, arguments, keywords)):
        worst = comparison.error.within(comparison.worst, comparison.worst)
        assert comparison.ok or (few and not comparison.note and worst), (comparison, case)


@st.composite
def drawn_prefills(draw_from, channels) -> Case:
    options = draw_from(
        st.fixed_dictionaries(
            {
                "bias": st.booleans(),
                "activation": st.sampled_from([None, "silu", "swish"]),
                "spare_rows": st.integers(0, 2),
            }
        )
    )
    B, T = draw_from(st.integers(1, 2)), draw_from(st.integers(1, 40))
    states = ["none", "initial"]
    if draw_from(st.booleans()):
        lengths = draw_from(st.lists(st.integers(0, 20), min_size=1, max_size=4))
        options |= {"lengths": tuple(lengths), "tail": draw_from(st.integers(0 if sum(lengths) else 1, 3))}
        B, T = 1, sum(lengths) + options["tail"]
        states += ["pool", "padding"]
    state = draw_from(st.sampled_from(states))
    options |= {
        "initial": state == "initial",
        "pool": state in ("pool", "padding"),
        "padding": state == "padding",
    }
    D, parts = draw_from(channels)
    if parts:
        options["sizes"] = parts
        if draw_from(st.booleans()):
            options["chunk_size"] = draw_from(st.sampled_from([16, 32]))
    W = draw_from(st.integers(2, 6))
    dtype = draw_from(st.sampled_from(sorted(DTYPES)))
    return Case(PREFILL, "drawn", {"B": B, "T": T, "D": D, "W": W}, dtype, dtype, options)


@st.composite
def drawn_updates(draw_from, channels) -> Case:
    options = draw_from(
        st.fixed_dictionaries(
            {
                "bias": st.booleans(),
                "activation": st.sampled_from([None, "silu"]),
                "slots": st.booleans(),
                "spec": st.booleans(),
                "padding": st.booleans(),
            }
        )
    )
    options["padding"] &= options["slots"]
    B = draw_from(st.integers(1, 4))
    if draw_from(st.booleans()):
        lengths = draw_from(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
        options |= {"lengths": tuple(lengths), "tail": draw_from(st.integers(0, 3))}
        B = len(lengths)
    W = draw_from(st.integers(2, 6))
    dims = {"S": B + 3, "L": W - 1 + draw_from(st.integers(0, 4)), "B": B, "D": draw_from(channels), "W": W}
    dtype = draw_from(st.sampled_from(sorted(DTYPES)))
    return Case(UPDATE, "drawn", dims, dtype, dtype, options)


ODD_CHANNELS = st.sampled_from([(1, ()), (13, ()), (40, (7, 33)), (24, (8, 8, 8))])
KERNEL_CHANNELS = st.sampled_from([(64, ()), (256, ()), (128, (64, 64)), (384, (128, 256))])


@settings(max_examples=10, deadline=None)
@given(case=drawn_prefills(ODD_CHANNELS), seed=st.integers(0, 100))
def test_drawn_prefills_xla(case: Case, seed: int):
    check(case, "xla", seed, few=True)


@settings(max_examples=6, deadline=None)
@given(
    case=drawn_prefills(KERNEL_CHANNELS),
    seed=st.integers(0, 100),
    rows=st.sampled_from([4, 8, 16, 32]),
    columns=st.sampled_from([64, 128, 256]),
)
def test_drawn_prefills_and_launches_mosaic(case: Case, seed: int, rows: int, columns: int):
    with override(PREFILL, twin="pallas", BLOCK_SIZE_T=rows, BLOCK_SIZE_D=columns):
        check(case, "mosaic_gpu", seed, few=True)


@settings(max_examples=10, deadline=None)
@given(case=drawn_updates(st.integers(1, 40)), seed=st.integers(0, 100))
def test_drawn_updates_xla(case: Case, seed: int):
    check(case, "xla", seed, few=True)


@settings(max_examples=6, deadline=None)
@given(
    case=drawn_updates(st.sampled_from([128, 256])),
    seed=st.integers(0, 100),
    columns=st.sampled_from([64, 128, 256]),
    batch=st.sampled_from([1, 2, 4]),
)
def test_drawn_updates_and_launches_mosaic(case: Case, seed: int, columns: int, batch: int):
    with override(UPDATE, twin="pallas", BLOCK_SIZE_D=columns, BLOCK_SIZE_B=batch):
        check(case, "mosaic_gpu", seed, few=True)


def prefill(lengths=(5, 0, 2, 9), D: int = 64, W: int = 4, dtype: str = "float32", **options: Any) -> Case:
    dims = {"B": 1, "T": sum(lengths) + options.get("tail", 0), "D": D, "W": W}
    full = {"bias": True, "activation": "silu", "lengths": lengths}
    return Case(PREFILL, "small", dims, dtype, dtype, full | options)


def update(B: int = 4, spare_rows: int = 0, dtype: str = "float32", **options: Any) -> Case:
    dims = {"S": B + 3, "L": 3 + spare_rows, "B": B, "D": 128, "W": 4}
    return Case(UPDATE, "small", dims, dtype, dtype, {"bias": True, "activation": "silu", "slots": True} | options)


def arrays_of(case: Case) -> dict[str, Any]:
    """Every argument by name, arrays as JAX's."""
    arguments, keywords = draw(case)
    names = ("x", "weight") if case.op == PREFILL else ("x", "conv_state", "weight")
    named = dict(zip(names, arguments, strict=True)) | keywords
    return {name: jnp.asarray(value) if isinstance(value, np.ndarray) else value for name, value in named.items()}


def call(case: Case, implementation: Any, named: dict[str, Any]) -> Any:
    """The op under a fresh jit (what was traced outside the interpreter would not be interpreted)."""
    function = OPERATORS[case.op].function(pallas_ssm, named)
    static = {name: value for name, value in named.items() if not isinstance(value, jax.Array)}
    dynamic = {name: value for name, value in named.items() if name not in static}

    def run(dynamic):
        return function(**dynamic, **static, implementation=implementation)

    if implementation == "xla":
        return jax.jit(run)(dynamic)
    with interpreted():
        return jax.block_until_ready(jax.jit(run)(dynamic))


def same(first: Any, second: Any) -> bool:
    return np.asarray(first).tobytes() == np.asarray(second).tobytes()


def test_the_result_depends_neither_on_the_launch_nor_on_what_else_is_packed():
    case = prefill((5, 0, 2, 41), D=256, W=5, initial=True)
    named = arrays_of(case)
    results = set()
    for rows, columns in ((8, 256), (16, 128), (32, 64), (64, 256)):
        with override(PREFILL, twin="pallas", BLOCK_SIZE_T=rows, BLOCK_SIZE_D=columns):
            y, state = call(case, "mosaic_gpu", named)
        results.add((np.asarray(y).tobytes(), np.asarray(state).tobytes()))
    assert len(results) == 1
    alone = named | {"x": named["x"][:, 7:], "initial_state": named["initial_state"][3:]}
    del alone["cu_seqlens"]
    y_alone, state_alone = call(case, "mosaic_gpu", alone)
    assert same(y_alone, y[:, 7:]) and same(state_alone, state[3:])


@BOTH
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_the_parts_are_those_of_the_whole(implementation, chunk_size):
    case = prefill((17, 0, 2, 16), D=256, tail=3, initial=True)
    named = arrays_of(case)
    y, state = call(case, implementation, named)
    parts, split_state = call(case, implementation, named | {"sizes": (128, 64, 64), "chunk_size": chunk_size})
    assert same(state, split_state) and [part.shape[2] for part in parts] == [128, 64, 64]
    rows = np.arange(y.shape[1])
    if chunk_size is not None:
        bounds = np.asarray(named["cu_seqlens"])
        starts = chunk_size * (bounds[:-1] // chunk_size + np.arange(4))
        rows = np.concatenate([start + np.arange(n) for start, n in zip(starts, np.diff(bounds), strict=True)])
    whole = np.zeros((1, parts[0].shape[1], 256), np.float32)
    whole[:, rows] = np.asarray(y)[:, : len(rows)]
    assert same(jnp.concatenate(parts, axis=2), whole)


@BOTH
@pytest.mark.parametrize("form", ["prefill", "update", "speculative"])
def test_states_are_copies_bit_for_bit_and_other_slots_stay(implementation, form):
    """Among the inputs are NaNs whose bits arithmetic would not keep."""
    if form == "prefill":
        case = prefill((5, 0, 2, 1), dtype="bfloat16", pool=True, padding=True, spare_rows=1)
    else:
        spec = form == "speculative"
        case = update(dtype="bfloat16", padding=True, spare_rows=2, lengths=(3, 1, 2, 1) if spec else None, spec=spec)
        case = Case(UPDATE, "bits", case.dims, "bfloat16", "bfloat16", {k: v for k, v in case.options.items() if v})
    named = arrays_of(case)
    strange = jnp.array([0x7F81, 0xFFC3, 0x8000, 0x0001], jnp.uint16).view(jnp.bfloat16)
    named["x"] = named["x"].at[..., :4].set(strange)
    named["conv_state"] = named["conv_state"].at[..., 4:8].set(strange)
    _, state = call(case, implementation, named)
    arguments = [
        np.asarray(named[name]) for name in ("x", "conv_state", "weight") if form != "prefill" or name != "conv_state"
    ]
    plain = {k: np.asarray(v) if isinstance(v, jax.Array) else v for k, v in named.items() if k not in ("x", "weight")}
    if form != "prefill":
        plain.pop("conv_state")
    with np.errstate(invalid="ignore"):
        expected = oracle_results(case, tuple(arguments), plain)["state"]
    assert same(state, expected)


@BOTH
@pytest.mark.parametrize("form", ["prefill", "aligned", "update", "packed", "speculative"])
def test_slots_past_the_pool_give_nan_and_touch_nothing(implementation, form):
    """Where nothing can be checked in time, under jit."""
    if form in ("prefill", "aligned"):
        case = prefill((5, 0, 2, 21), pool=True, **({"sizes": (64,), "chunk_size": 16} if form == "aligned" else {}))
        indices = "state_indices"
    else:
        options: dict[str, Any] = {"spec": form == "speculative"}
        if form != "update":
            options["lengths"] = (1, 1, 1, 1)
        case = update(spare_rows=1, **options)
        indices = "conv_state_indices"
    named = arrays_of(case)
    pool, slots = named["conv_state"], named[indices]
    good_y, good = call(case, implementation, named)
    bad_y, bad = call(case, implementation, named | {indices: slots.at[2].set(len(pool)).at[3].set(2**31 - 1)})
    if form == "aligned":
        (good_y,), (bad_y,) = good_y, bad_y
    elif form != "prefill":
        good_y, bad_y = good_y[None], bad_y[None]
    first, end = {"prefill": (5, 28), "aligned": (32, 34)}.get(form, (2, 4))
    assert jnp.isnan(bad_y[0, first:end]).all()
    assert same(bad_y[0, :first], good_y[0, :first])
    if form == "aligned":  # the rows between the sequences are zero all the same
        assert not bad_y[0, 34:48].any() and jnp.isnan(bad_y[0, 48:69]).all() and not bad_y[0, 69:].any()
    assert same(bad[slots[:2]], good[slots[:2]]) and same(bad[slots[2:]], pool[slots[2:]])


@pytest.mark.parametrize("spec", [False, True])
def test_a_block_takes_live_slots_and_others(spec):
    case = update(spare_rows=2, spec=spec)
    named = arrays_of(case)
    slots = named["conv_state_indices"]
    named["conv_state_indices"] = slots.at[1].set(-1).at[2].set(len(named["conv_state"]))
    results = []
    for batch in (1, 4):
        with override(UPDATE, twin="pallas", BLOCK_SIZE_D=128, BLOCK_SIZE_B=batch):
            results.append(call(case, "mosaic_gpu", named))
    assert all(same(a, b) for a, b in zip(*results, strict=True))
    y, state = results[1]
    assert not y[1].any() and jnp.isnan(y[2]).all() and jnp.isfinite(y[::3]).all()
    assert same(state[slots[1:3]], named["conv_state"][slots[1:3]])


@BOTH
def test_bounds_out_of_range_are_clamped(implementation):
    case = prefill((5, 0, 2, 9), tail=2)
    named = arrays_of(case)
    wild, tame = jnp.array([-5, 3, 3, 99, 99], jnp.int32), jnp.array([0, 3, 3, 18, 18], jnp.int32)
    got, expected = (call(case, implementation, named | {"cu_seqlens": bounds}) for bounds in (wild, tame))
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    case = update(lengths=(1, 2, 1), tail=1, B=3)
    named = arrays_of(case)
    wild, tame = jnp.array([2, 3, 99, 99], jnp.int32), jnp.array([0, 3, 5, 5], jnp.int32)
    got, expected = (call(case, implementation, named | {"cu_seqlens": bounds}) for bounds in (wild, tame))
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


@BOTH
def test_indices_may_be_int64_and_out_of_int32(implementation):
    case = prefill(pool=True)
    named = arrays_of(case)
    with jax.enable_x64(True):
        wide = {name: named[name].astype(jnp.int64) for name in ("cu_seqlens", "state_indices")}
        got, expected = call(case, implementation, named | wide), call(case, implementation, named)
        assert all(same(a, b) for a, b in zip(got, expected, strict=True))
        past = wide["state_indices"].at[0].add(2**32)
        y, state = call(case, implementation, named | wide | {"state_indices": past})
    slot = named["state_indices"][0]
    assert jnp.isnan(y[0, :5]).all() and same(state[slot], named["conv_state"][slot])


@BOTH
@pytest.mark.parametrize("op", [PREFILL, UPDATE])
def test_padding_does_not_look_at_its_operands(implementation, op):
    """Rows and slots that belong to nobody are poisoned; they must leave no trace."""
    if op == PREFILL:
        case = prefill((3, 2, 9, 1), tail=2, pool=True, padding=True)
        padded = np.r_[0:3, 14:17]
    else:
        case = update(lengths=(3, 2, 1, 1), tail=2, padding=True)
        padded = np.r_[0:3, 6:9]
    named = arrays_of(case)
    slots = named["state_indices" if op == PREFILL else "conv_state_indices"]
    live = np.asarray(slots)[1:3]
    dead = np.setdiff1d(np.arange(7), live)
    named["x"] = named["x"].at[..., padded, :].set(jnp.nan)
    named["conv_state"] = named["conv_state"].at[dead].set(jnp.nan)
    y, state = call(case, implementation, named)
    assert jnp.isfinite(y).all() and not y[..., padded, :].any()
    assert same(state[dead], named["conv_state"][dead]) and jnp.isfinite(state[live]).all()


@BOTH
def test_no_tokens_is_no_work(implementation):
    case = prefill(initial=True)
    named = arrays_of(case)
    nothing = {"x": named["x"][:, :0], "cu_seqlens": jnp.zeros(5, jnp.int32)}
    y, state = call(case, implementation, named | nothing)
    assert y.shape == (1, 0, 64) and same(state, named["initial_state"])
    nobody = {"cu_seqlens": jnp.zeros(1, jnp.int32), "initial_state": named["initial_state"][:0]}
    y, state = call(case, implementation, named | nobody)
    assert y.shape == (1, 16, 64) and not y.any() and state.shape == (0, 3, 64)
    case = update()
    named = arrays_of(case)
    y, state = call(case, implementation, named | {"x": named["x"][:0], "conv_state_indices": jnp.zeros(0, jnp.int32)})
    assert y.shape == (0, 128) and same(state, named["conv_state"])


@BOTH
def test_one_program_serves_every_packing(implementation):
    rng = np.random.default_rng(0)
    named = arrays_of(prefill((10, 10, 20), initial=True))
    x, weight, initial = (named[name] for name in ("x", "weight", "initial_state"))

    def convolve(bounds):
        return pallas_ssm.causal_conv1d(
            x, weight, initial_state=initial, cu_seqlens=bounds, implementation=implementation
        )

    def pack():
        # Compiled once, ahead of every packing but its shape: no later call can have it compiled again.
        run = jax.jit(convolve).lower(jax.ShapeDtypeStruct((4,), jnp.int32)).compile()
        for _ in range(50):
            bounds = np.sort(np.r_[0, rng.integers(0, 41, 3)]).astype(np.int32)
            y, state = run(jnp.array(bounds))
            expected = oracle_results(
                prefill(), (np.asarray(x), np.asarray(weight)),
                {"initial_state": np.asarray(initial), "cu_seqlens": bounds},
            )  # fmt: skip
            np.testing.assert_allclose(y, expected["y"], rtol=1e-5, atol=1e-5)
            assert same(state, expected["state"])

    if implementation == "xla":
        pack()
    else:
        with interpreted():
            pack()


def test_new_bounds_trace_nothing():
    named = arrays_of(prefill((10, 10, 20), initial=True))
    x, weight, initial = (named[name] for name in ("x", "weight", "initial_state"))
    traces = []

    @jax.jit
    def convolve(bounds):
        traces.append(bounds)
        return pallas_ssm.causal_conv1d(x, weight, initial_state=initial, cu_seqlens=bounds, implementation="xla")

    for bounds in ((0, 10, 20, 40), (0, 0, 1, 40), (0, 40, 40, 40), (0, 0, 0, 0)):
        convolve(jnp.array(bounds, jnp.int32))
    assert len(traces) == 1
