"""The Mosaic GPU kernel of `fused_recurrent_gated_delta_rule`: interpreted, with race detection, and compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_ssm
from pallas_ssm.gdn._recurrent_launch import plan_launch
from ssm_configs import override
from ssm_configs.contracts.gdn import RecurrentDims

from .cases import Case
from .compare import against_oracle
from .inputs import DTYPES, draw
from .interpret_mosaic import interpreted
from .operators import OPERATORS, oracle_results
from .runners import jax_runner
from .test_pallas_gates import check as check_compiled

OP = "fused_recurrent_gated_delta_rule"
update: Any = pallas_ssm.fused_recurrent_gated_delta_rule  # NumPy's arrays are as good as JAX's
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


def small(**options: Any) -> Case:
    dims = {"S": 8, "B": 3, "H_k": 1, "H_v": 2, "K": 16, "V": 32} | options.pop("dims", {})
    dtypes = {name: options.pop(name) for name in ("dtype", "state_dtype") if name in options}
    return Case(OP, "small", dims, **dtypes, options={"slots": True} | options)


def check(case: Case, BLOCK_SIZE_V: int, seed: int = 0, few: bool = False) -> None:
    """`few`: so few elements that one unlucky rounding is the whole relative error, not an average over many."""
    arguments, keywords = draw(case, seed)
    with override(OP, twin="pallas", BLOCK_SIZE_V=BLOCK_SIZE_V):
        result = jax_runner(OPERATORS[OP], None, True, implementation="mosaic_gpu")(arguments, keywords)
    for comparison in against_oracle(case, arguments, keywords, result, oracle_results(case, arguments, keywords)):
        assert comparison.ok or (few and comparison.error.within(comparison.worst, comparison.worst)), comparison


def call(implementation: str | None, arguments: Any, keywords: dict[str, Any], block: int = 16) -> tuple[Any, Any]:
    """(o, state) under a fresh jit: what was traced outside the interpreter would not be interpreted."""
    arrays = {name: value for name, value in keywords.items() if isinstance(value, np.ndarray | jax.Array)}
    others = {name: value for name, value in keywords.items() if name not in arrays}

    def function(arguments, arrays):
        return update(*arguments, **arrays, **others, implementation=implementation)

    with override(OP, twin="pallas", BLOCK_SIZE_V=block), interpreted():
        o, state = jax.block_until_ready(jax.jit(function)(arguments, arrays))
    return np.asarray(o), np.asarray(state)


GATED = {"gates": True, "l2norm": True}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "a slot each, by place": (32, {"slots": False, "dtype": "float32"}),
    "as served, two tiles a block": (16, {**GATED, "dims": {"K": 256, "V": 32, "B": 2}}),
    "destinations and a null slot": (16, {"dst": True, "padding": True, "dims": {"S": 10, "H_k": 2, "H_v": 6}}),
    "16-bit states": (8, {**GATED, "dt_bias": False, "dtype": "float16", "state_dtype": "float16", "scale": 0.3}),
    "K off the powers of two": (64, {**GATED, "dims": {"K": 24, "V": 16, "H_v": 3}, "state_dtype": "bfloat16"}),
    "packed": (8, {**GATED, "lengths": (3, 0, 2), "tail": 2}),
    "packed, destinations, padding": (16, {"lengths": (1, 2, 1), "dst": True, "padding": True, "dims": {"S": 10}}),
    "speculative": (
        32,
        {**GATED, "lengths": (3, 1, 2), "spec": 2, "dst": True, "padding": True, "state_dtype": "bfloat16", "dims": {"S": 16}},
    ),
    "speculative, a token each": (32, {"spec": 3, "dims": {"S": 12}}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name: str):
    block, options = CASES[name]
    check(small(**options), block)


@st.composite
def drawn_cases(draw_from: Any) -> Case:
    H_k = draw_from(st.integers(1, 2))
    options: dict[str, Any] = {name: draw_from(st.booleans()) for name in ("gates", "l2norm", "dst", "padding")}
    lengths = draw_from(st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=3))
    if lengths is not None:
        options |= {"lengths": tuple(lengths), "tail": draw_from(st.integers(0, 2))}
        if draw_from(st.booleans()):
            options["spec"] = draw_from(st.integers(1, 4))
    dims = {
        "S": 26, "B": draw_from(st.integers(1, 3)) if lengths is None else len(lengths), "H_k": H_k,
        "H_v": H_k * draw_from(st.integers(1, 2)), "K": draw_from(st.sampled_from([16, 32, 48])),
        "V": draw_from(st.sampled_from([16, 24, 32])),
    }  # fmt: skip
    dtypes = {name: draw_from(st.sampled_from(sorted(DTYPES))) for name in ("dtype", "state_dtype")}
    return small(**{name: value for name, value in options.items() if value is not False}, **dtypes, dims=dims)


@settings(max_examples=4, deadline=None)
@given(case=drawn_cases(), block=st.sampled_from([4, 8, 16, 32]), seed=st.integers(0, 99))
def test_drawn(case: Case, block: int, seed: int):
    check(case, block, seed, few=True)


def test_the_launch_changes_no_more_than_the_order_of_sums():
    arguments, keywords = draw(small(**GATED, dims={"K": 256, "B": 1}))
    by_block = [call("mosaic_gpu", arguments, keywords, block) for block in (8, 16, 32)]
    for results in zip(*by_block, strict=True):
        # Sums over K in another order, where the shape of a tile is another.
        differences = [np.abs(result.astype(np.float32) - results[0].astype(np.float32)).max() for result in results]
        assert max(differences) < (2**-8 if results[0].dtype.itemsize == 2 else 1e-6) * np.abs(results[0]).max()


def test_slots_past_the_pool_give_nan_and_touch_nothing():
    """Where nothing can be checked in time, under jit."""
    arguments, keywords = draw(small(dst=True))
    S, state = 8, arguments[5]
    source, target = keywords["state_indices"].copy(), keywords["dst_state_indices"].copy()
    good_o, good_state = call("mosaic_gpu", arguments, keywords)
    source[1], target[2] = S, 2**31 - 1
    o, new = call("mosaic_gpu", arguments, {"state_indices": source, "dst_state_indices": target})
    assert np.isnan(o[1:].astype(np.float32)).all() and (o[0] == good_o[0]).all()
    assert (new[target[0]] == good_state[target[0]]).all()
    others = np.arange(S) != target[0]
    assert (new[others] == state[others]).all()


def test_only_a_slot_past_the_pool_is_lost_in_speculative_decode():
    arguments, keywords = draw(small(lengths=(3, 2), spec=3, dims={"S": 12, "B": 2}))
    keywords["num_accepted_tokens"] = np.ones(2, np.int32)
    good_o, good_state = call("mosaic_gpu", arguments, keywords)
    slots = keywords["state_indices"].copy()
    lost, slots[0, 1] = slots[0, 1], 12
    o, new = call("mosaic_gpu", arguments, keywords | {"state_indices": slots})
    assert np.isnan(o[1].astype(np.float32)).all()
    assert (np.delete(o, 1, 0) == np.delete(good_o, 1, 0)).all()
    assert (np.delete(new, lost, 0) == np.delete(good_state, lost, 0)).all()
    assert (new[lost] == arguments[5][lost]).all()


def test_bounds_out_of_range_are_clamped_and_padding_does_not_look_at_its_operands():
    arguments, keywords = draw(small(lengths=(1, 2, 1), tail=1))
    wild = np.array([-5, 3, 2, 99], np.int32)
    expected_o, expected_state = call("xla", arguments, keywords | {"cu_seqlens": wild})
    o, state = call("mosaic_gpu", arguments, keywords | {"cu_seqlens": wild})
    own = [0, 1, 3, 4]  # token 2 is the first's and the last's
    assert np.allclose(o[own].astype(np.float32), expected_o[own].astype(np.float32), rtol=1e-2, atol=1e-3)
    assert np.allclose(state, expected_state, rtol=1e-5, atol=1e-6)
    assert o[3:].any() and not np.array_equal(state, arguments[5])

    keywords["state_indices"][0] = -1
    others = np.setdiff1d(np.arange(8), keywords["state_indices"])
    clean = call("mosaic_gpu", arguments, keywords)
    spoilt = [array.copy() for array in arguments]
    for array in spoilt[:5]:
        array[[0, 4]] = np.nan
    spoilt[5][others] = np.nan
    o, state = call("mosaic_gpu", spoilt, keywords)
    assert not o[[0, 4]].any() and o.tobytes() == clean[0].tobytes()
    assert state[others].tobytes() == spoilt[5][others].tobytes()
    assert np.isfinite(np.delete(state, others, 0)).all()


def test_gradients_and_vmap():
    arguments, keywords = draw(small(**GATED, dtype="float32", dims={"B": 2, "V": 16}))
    arrays = tuple(jnp.asarray(array) for array in arguments)

    def loss(arrays: Any, implementation: str) -> jax.Array:
        o, state = update(*arrays, **keywords, implementation=implementation)
        return (o * jnp.cos(o)).sum() + (state**2).sum()

    with interpreted():
        got = jax.block_until_ready(jax.jit(jax.grad(loss), static_argnums=1)(arrays, "mosaic_gpu"))
    expected = jax.jit(jax.grad(loss), static_argnums=1)(arrays, "xla")
    # The backward pass is XLA's; o and the state that it starts from are the kernel's.
    for a, b in zip(got, expected, strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-5)

    batch = tuple(jnp.stack([array, 2 * array]) for array in arrays)
    with interpreted():
        assert pallas_ssm.explain(OP, *arrays, **keywords).implementation == "mosaic_gpu"
        o, state = jax.vmap(lambda *a: update(*a, **keywords))(*batch)
        with pytest.raises(NotImplementedError, match=f"{OP}: the mosaic_gpu kernel is not batched by jax.vmap"):
            jax.vmap(lambda *a: update(*a, **keywords, implementation="mosaic_gpu"))(*batch)
    second = update(*(array[1] for array in batch), **keywords, implementation="xla")
    assert np.allclose(o[1], second[0], rtol=1e-5, atol=1e-6) and np.allclose(state[1], second[1], rtol=1e-5, atol=1e-6)


def test_which_implementation_and_why():
    arguments, keywords = draw(small())
    with interpreted():
        chosen = pallas_ssm.explain(OP, *arguments, **keywords)
        packed, options = draw(small(lengths=(1, 2, 1)))
        with_bounds = pallas_ssm.explain(OP, *packed, **options)
        asked = pallas_ssm.explain(OP, *packed, **options, implementation="xla")
        odd, keywords = draw(small(dims={"K": 17, "V": 5}))
        refused = r"finds no register layout for a \[K=17, V=5\] float32 state"
        with pytest.raises(NotImplementedError, match=f"{OP}: the mosaic_gpu kernel {refused}"):
            update(*odd, **keywords, implementation="mosaic_gpu")
    assert chosen.implementation == "mosaic_gpu" and chosen.launch is not None
    assert with_bounds.implementation == "mosaic_gpu" and with_bounds.launch is not None
    assert asked.implementation == "xla" and asked.reason == "asked for"
    with pytest.raises(NotImplementedError, match=f"{OP}: the mosaic_gpu kernel does not run on a CPU outside"):
        update(*odd, **keywords, implementation="mosaic_gpu")


PLANS = [  # K, V, state_dtype, BLOCK_SIZE_V, packed: BLOCK_SIZE_V as launched, columns of a tile
    ((128, 128, "float32", 8, False), (8, 8)),
    ((128, 128, "float32", 32, False), (32, 32)),
    ((128, 128, "float32", 128, False), (128, 32)),
    ((128, 128, "bfloat16", 256, False), (128, 32)),
    ((128, 128, "float32", 128, True), (32, 32)),
    ((256, 256, "float32", 256, False), (64, 16)),  # more would not leave room for a second block
    ((256, 256, "bfloat16", 256, False), (128, 16)),
    ((96, 96, "float32", 64, False), (32, 32)),
    ((24, 16, "float32", 1, False), (16, 16)),  # the least that gives every thread an element
    ((128, 30, "float32", 64, False), (30, 30)),
    ((256, 30, "bfloat16", 64, False), (15, 15)),  # rows that TMA cannot fetch
]  # fmt: skip


@pytest.mark.parametrize(("given", "launched"), PLANS, ids=[str(given) for given, _ in PLANS])
def test_the_launch_follows_the_knob_as_far_as_the_shape_allows(given: Any, launched: tuple[int, int]):
    K, V, state_dtype, block, packed = given
    dims = RecurrentDims(S=9, T=8, N_seq=8, H_k=16, H_v=32, K=K, V=V, T_max=1)
    launch = plan_launch(dims, state_dtype, {"BLOCK_SIZE_V": block}, packed=packed)
    assert (launch.BLOCK_SIZE_V, launch.columns) == launched
    assert launch.use_tma == (launch.tiles_per_block > 1) and V % launch.BLOCK_SIZE_V == 0
    assert launch.layout.copies == 1 and launch.columns % launch.layout.columns == 0 and K % launch.layout.rows == 0


SERVED = {"op": OP, "K": 128, "V": 128, "state_dtype": "float32"}
ROWS = [
    {"BLOCK_SIZE_V": 32},
    {"BLOCK_SIZE_V": 64, "state_dtype": "bfloat16"},
    {"BLOCK_SIZE_V": 128, "dst": True, "padding": True, "plain": True, "S": 4200},  # more than 2^31 elements
    {"BLOCK_SIZE_V": 32, "packed": True, "speculative": True, "dst": True, "padding": True},
    {"BLOCK_SIZE_V": 16, "K": 24, "V": 16, "slots": False, "state_dtype": "float16", "dtype": "float32"},
]


@pytest.mark.parametrize(("arch", "rows"), [("sm_90a", ROWS), ("sm_100a", ROWS[1:2]), ("sm_120a", ROWS[2:3])])
def test_it_compiles_in_place_without_a_spill(arch: str, rows: list[dict]):
    results = check_compiled(arch, [SERVED | row for row in rows])
    # What hides the memory's latency is other blocks of the SM: registers for four of them.
    assert all(result["registers"] <= 128 for result in results)
