"""Around the convolutions of `pallas_ssm`: gradients, batching, donation, errors, launches, what ahead-of-time compiles use."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_ssm
from pallas_ssm._causal_conv1d_call import Static
from pallas_ssm._causal_conv1d_launch import PREFILL, UPDATE, plan_prefill, plan_update, row_blocks
from ssm_configs import SPECS
from ssm_configs.contracts.causal_conv1d import Dims

from . import oracle
from .cases import CONV_CHANNELS, Case
from .inputs import draw
from .interpret_mosaic import interpreted
from .test_pallas_causal_conv1d import arrays_of, call, prefill, same, update
from .test_pallas_gates import check as check_gates

SPLIT = f"{PREFILL}_split"
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")

FORMS = {
    "dense": Case(PREFILL, "dense", {"B": 2, "T": 5, "D": 64, "W": 4}, "float32", "float32",
                  {"bias": True, "activation": "silu", "initial": True}),
    "packed": prefill((5, 0, 2, 4), tail=1, initial=True),
    "no state, no bias": prefill((5, 0, 2, 4), bias=False, activation=None),
    "pool": prefill((5, 0, 2, 4, 1), pool=True, padding=True, spare_rows=1),
    "aligned": prefill((5, 0, 2, 4), initial=True, sizes=(64,), chunk_size=16),
    "update": update(padding=True),
    "packed update": update(lengths=(2, 0, 5, 1), tail=1),
    "speculative": update(lengths=(2, 0, 5, 1), spare_rows=2, spec=True),
}  # fmt: skip


def problem(form: str):
    """(function, float arguments by name, the other arguments, weights of a scalar loss)."""
    case = FORMS[form]
    arguments, keywords = draw(case)
    names = ("x", "weight") if case.op == PREFILL else ("x", "conv_state", "weight")
    named = dict(zip(names, arguments, strict=True)) | keywords
    floats = {n: a for n, a in named.items() if isinstance(a, np.ndarray) and a.dtype == np.float32}
    others = {name: value for name, value in named.items() if name not in floats}
    function = SPLIT if "sizes" in keywords else case.op
    rng = np.random.default_rng(1)
    results = jax.tree.leaves(getattr(oracle, function)(**floats, **others))
    return function, floats, others, [rng.standard_normal(result.shape) for result in results]


def loss(function, weights, floats, others):
    """Sees y and the new state."""
    results = jax.tree.leaves(function(**floats, **others))
    return sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))


def gradients(function, floats, others, weights, implementation):
    called = functools.partial(getattr(pallas_ssm, function), implementation=implementation)
    weights = [jnp.asarray(weight, jnp.float32) for weight in weights]
    compute = jax.jit(jax.grad(lambda floats: loss(called, weights, floats, others)))
    if implementation == "xla":
        return compute(floats)
    with interpreted():
        return jax.block_until_ready(compute(floats))


@pytest.mark.parametrize("form", FORMS)
def test_every_float_argument_against_finite_differences_of_the_oracle(form):
    function, floats, others, weights = problem(form)
    got = gradients(function, floats, others, weights, "xla")
    assert set(got) == set(floats)
    exact = {name: array.astype(np.float64) for name, array in floats.items()}
    rng = np.random.default_rng(2)
    for name, array in exact.items():
        direction = rng.standard_normal(array.shape)
        ahead, behind = (
            loss(getattr(oracle, function), weights, exact | {name: array + h * direction}, others)
            for h in (1e-5, -1e-5)
        )
        expected = (ahead - behind) / 2e-5
        # The sum along a direction cancels; what was summed is the measure of its error.
        summed = np.asarray(got[name], np.float64) * direction
        assert abs(summed.sum() - expected) < 2e-6 * np.abs(summed).sum(), name


@pytest.mark.parametrize("form", ["pool", "speculative"])
def test_both_implementations_have_the_same_backward_pass(form):
    by_xla, by_kernel = (gradients(*problem(form), implementation) for implementation in ("xla", "mosaic_gpu"))
    for name in by_xla:
        # In two programs, where a compiler may contract products and sums in two ways.
        np.testing.assert_allclose(by_xla[name], by_kernel[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("form", ["packed", "pool", "update", "packed update"])
def test_what_padding_holds_reaches_no_gradient(form):
    function, floats, others, weights = problem(form)
    clean = gradients(function, floats, others, weights, "xla")
    slots = others.get("state_indices", others.get("conv_state_indices"))
    bounds = others.get("cu_seqlens", np.arange(floats["x"].shape[0] + 1))
    padded = np.r_[bounds[-1] : floats["x"].shape[-2]]
    if slots is not None and others.get("null_slot") is not None:
        dead = (slots < 0) | (slots == others["null_slot"])
        padded = np.r_[padded, *(np.r_[bounds[n] : bounds[n + 1]] for n in np.flatnonzero(dead))]
    padded = padded.astype(int)
    assert len(padded)
    floats["x"] = floats["x"].copy()
    floats["x"][..., padded, :] = np.nan
    poisoned = gradients(function, floats, others, weights, "xla")
    assert all(same(poisoned[name], clean[name]) for name in floats)
    assert not np.asarray(clean["x"])[..., padded, :].any()


@pytest.mark.parametrize("form", ["packed", "update"])
def test_vmap(form):
    function, floats, others, _ = problem(form)
    called = getattr(pallas_ssm, function)
    batch = jnp.stack([floats["x"], 2 * floats["x"], -floats["x"]])

    def call(x, implementation):
        return called(**floats | {"x": x}, **others, implementation=implementation)

    expected = [call(x, "xla") for x in batch]
    got = jax.vmap(lambda x: call(x, "xla"))(batch)
    with interpreted():  # where the kernel could run, and None still has to take XLA
        automatic = jax.block_until_ready(jax.jit(jax.vmap(lambda x: call(x, None)))(batch))
        with pytest.raises(NotImplementedError, match=r"is not batched by jax\.vmap"):
            jax.vmap(lambda x: call(x, "mosaic_gpu"))(batch)
    for i, pair in enumerate(expected):
        for result in (got, automatic):
            for a, b in zip(result, pair, strict=True):
                np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form", ["pool", "update", "packed update", "speculative"])
def test_a_donated_pool_is_not_copied_by_xla(form):
    function, floats, others, _ = problem(form)
    pool = jnp.asarray(floats.pop("conv_state"))
    arrays = {name: jnp.asarray(value) for name, value in others.items() if isinstance(value, np.ndarray)}
    static = {name: value for name, value in others.items() if name not in arrays}

    @functools.partial(jax.jit, donate_argnums=0)
    def run(conv_state, floats, arrays):
        called = getattr(pallas_ssm, function)
        return called(conv_state=conv_state, **floats, **arrays, **static, implementation="xla")

    compiled: Any = run.lower(pool, floats, arrays).compile()
    shape = f"f32[{','.join(map(str, pool.shape))}]"
    assert not [line for line in compiled.as_text().splitlines() if " copy(" in line and shape in line]
    assert compiled.memory_analysis().alias_size_in_bytes == pool.nbytes
    run(pool, floats, arrays)
    assert pool.is_deleted()


def test_without_donation_the_caller_keeps_the_pool():
    for case in (prefill(pool=True), update()):
        named = arrays_of(case)
        before = np.array(named["conv_state"])
        with interpreted():
            jax.block_until_ready(getattr(pallas_ssm, case.op)(**named, implementation="mosaic_gpu"))
        assert same(named["conv_state"], before)


PREFILL_ERRORS = {
    "x rank": ({"x": lambda k: k["x"][0]}, ValueError, r"x: expected rank 3 \[B, T, D\], got rank 2"),
    "width": ({"weight": lambda k: k["weight"][:, :1]}, ValueError, r"weight: expected a width of 2 to 6, got W=1"),
    "channels": ({"weight": lambda k: k["weight"][:9]}, ValueError, r"weight: expected shape \(D=64, W=4\), got \(9, 4\)"),
    "bias": ({"bias": lambda k: k["bias"][:9]}, ValueError, r"bias: expected shape \(D=64,\), got \(9,\)"),
    "activation": ({"activation": lambda k: "gelu"}, ValueError, r"activation: expected None, 'silu' or 'swish', got 'gelu'"),
    "not an array": ({"weight": lambda k: 1.0}, TypeError, r"weight: expected an array, got float"),
    "nothing": ({"weight": lambda k: None}, TypeError, r"weight: expected an array, got None"),
    "packed batch": (
        {"x": lambda k: jnp.concatenate([k["x"], k["x"]])}, ValueError, r"x: expected B=1 with cu_seqlens, got \(2, 16, 64\)"
    ),
    "state dtype": (
        {"conv_state": lambda k: k["conv_state"].astype(jnp.float16)}, TypeError, r"conv_state: expected the dtype of x"
    ),
    "no slots": ({"state_indices": lambda k: None}, ValueError, r"state_indices: expected shape \(N_seq=4,\) with conv_state"),
    "two states": (
        {"initial_state": lambda k: jnp.zeros((4, 3, 64))}, ValueError, r"initial_state: expected None with conv_state"
    ),
    "has_initial_state": (
        {"has_initial_state": lambda k: jnp.ones(4, jnp.int32)}, TypeError, r"has_initial_state: expected dtype bool, got int32"
    ),
    "slot beyond the pool": (
        {"state_indices": lambda k: k["state_indices"].at[1].set(7)}, ValueError, r"state_indices: expected slots < S=7, got 7"
    ),
    "cu_seqlens descend": (
        {"cu_seqlens": lambda k: jnp.array([0, 5, 4, 7, 16])}, ValueError, r"cu_seqlens: expected 0 <= … <= T=16 without a desc"
    ),
    "sizes": ({"sizes": lambda k: (32, 16)}, ValueError, r"sizes: expected .* positive channel counts that add up to D=64"),
    "sizes type": ({"sizes": lambda k: 64}, TypeError, r"sizes: expected a tuple of ints, got int"),
    "no sizes": ({"sizes": lambda k: None}, TypeError, r"sizes: expected a tuple of ints, got NoneType"),
    "chunk_size": (
        {"sizes": lambda k: (64,), "chunk_size": lambda k: 24}, ValueError, r"chunk_size: expected a power of two"
    ),
    "implementation": (
        {"implementation": lambda k: "triton"}, ValueError, r"implementation: expected one of .* got 'triton'"
    ),
    "the kernel on a CPU": (
        {"implementation": lambda k: "mosaic_gpu"},
        NotImplementedError, r"causal_conv1d: the mosaic_gpu kernel does not run on a CPU outside plgpu.force_gpu_interpret",
    ),
}  # fmt: skip
UPDATE_ERRORS = {
    "x rank": ({"x": lambda k: k["x"][None]}, ValueError, r"x: expected rank 2 \[T, D\], got rank 3"),
    "short pool": (
        {"conv_state": lambda k: k["conv_state"][:, :2]}, ValueError, r"conv_state: expected shape .* with L >= 3 rows"
    ),
    "slot beyond the pool": (
        {"conv_state_indices": lambda k: k["conv_state_indices"].at[1].set(7)},
        ValueError, r"conv_state_indices: expected slots < S=7, got 7",
    ),
    "too few slots": (
        {"conv_state_indices": lambda k: None, "conv_state": lambda k: k["conv_state"][:3]},
        ValueError, r"conv_state: expected at least one slot for each of 4 sequences, got S=3",
    ),
    "null slot": (
        {"conv_state_indices": lambda k: None, "null_slot": lambda k: 0},
        ValueError, r"null_slot: expected None without conv_state_indices, got 0",
    ),
    "accepted": (
        {"num_accepted_tokens": lambda k: jnp.ones(3, jnp.int32)}, ValueError, r"num_accepted_tokens: expected shape"
    ),
    "the kernel on a CPU": (
        {"implementation": lambda k: "mosaic_gpu"},
        NotImplementedError, r"causal_conv1d_update: the mosaic_gpu kernel does not run on a CPU outside",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "name"), [*((PREFILL, n) for n in PREFILL_ERRORS), *((UPDATE, n) for n in UPDATE_ERRORS)]
)
def test_errors_name_the_argument_and_touch_nothing(op, name):
    spoilt, kind, text = (PREFILL_ERRORS if op == PREFILL else UPDATE_ERRORS)[name]
    named = arrays_of(prefill(pool=True) if op == PREFILL else update())
    named |= {key: spoil(named) for key, spoil in spoilt.items()}
    before = np.array(named["conv_state"])
    with pytest.raises(kind, match=text):
        getattr(pallas_ssm, SPLIT if "sizes" in named else op)(**named)
    assert same(named["conv_state"], before)


def test_none_takes_xla_where_the_kernel_declines():
    for case, text in (
        (prefill(D=37), r"needs channels in multiples of 128 bytes, 32 of float32, got D=37"),
        (prefill(D=96, sizes=(48, 48)), r"multiples of 128 bytes, 32 of float32, got sizes=\(48, 48\)"),
        (
            Case(UPDATE, "", dict(update().dims) | {"D": 96}, "float32", "float32", update().options),
            r"multiples of 128, got D=96",
        ),
    ):
        named = arrays_of(case)
        expected, got = call(case, "xla", named), call(case, None, named)
        with pytest.raises(NotImplementedError, match=text):
            call(case, "mosaic_gpu", named)
        assert all(same(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True))


def test_explain_tells_what_runs_and_why():
    named = arrays_of(prefill(D=256, pool=True))
    shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) if isinstance(a, jax.Array) else a for n, a in named.items()}
    assert str(pallas_ssm.explain(PREFILL, **named)).startswith(
        f"{PREFILL}: xla (the mosaic_gpu kernel does not run on"
    )
    with interpreted(), pallas_ssm.override(PREFILL, twin="pallas", BLOCK_SIZE_T=8, BLOCK_SIZE_D=128):
        for op, more in ((PREFILL, {}), (SPLIT, {"sizes": (128, 128), "chunk_size": 16})):
            explanation = pallas_ssm.explain(op, **shapes, **more)
            assert explanation.implementation == "mosaic_gpu"
            assert (explanation.launch.BLOCK_SIZE_T, explanation.launch.BLOCK_SIZE_D) == (8, 128)
            assert "NVIDIA H200" in str(explanation) and "override" in str(explanation)
    with interpreted():
        assert pallas_ssm.explain(UPDATE, **arrays_of(update())).launch.BLOCK_SIZE_D == 128
    with pytest.raises(ValueError, match="op: expected one of"):
        pallas_ssm.explain("conv")


def static_of(D: int, W: int, sizes=(), chunk_size=None, packed=True) -> Static:
    rows = 1000 if chunk_size is None else chunk_size * (1000 // chunk_size + 4)
    return Static(PREFILL, Dims(1, 1000, D, W, 4, 0, 0, packed, rows), True, None, sizes or (D,), chunk_size)


@pytest.mark.parametrize("D", CONV_CHANNELS.values())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_legal_knob_gives_a_launch_that_covers_the_channels(D, dtype):
    itemsize = jnp.dtype(dtype).itemsize
    for rows in (4, 8, 16, 32, 64, 128):
        for columns in (64, 128, 256, 512, 1024, 2048):
            for W in (2, 4, 6):
                for sizes, chunk_size in (((), None), ((D - 256, 128, 128), 64), ((D - 128, 64, 64), 16)):
                    static = static_of(D, W, sizes, chunk_size)
                    launch = plan_prefill(static, dtype, {"BLOCK_SIZE_T": rows, "BLOCK_SIZE_D": columns})
                    assert all(size % launch.BLOCK_SIZE_D == 0 for size in static.sizes)
                    assert launch.strips * launch.strip_rows == launch.BLOCK_SIZE_T
                    assert launch.strip_rows >= W - 1 and launch.strip_rows % launch.unroll == 0
                    assert launch.BLOCK_SIZE_D * itemsize % 128 == 0 and launch.BLOCK_SIZE_D <= 256
                    assert launch.BLOCK_SIZE_D * launch.strips % (128 * launch.layout.vector) == 0
                    if chunk_size is not None:
                        assert chunk_size % launch.BLOCK_SIZE_T == 0
                        assert row_blocks(static, launch.BLOCK_SIZE_T) * launch.BLOCK_SIZE_T == static.dims.rows
    for columns in (64, 128, 256, 512, 1024, 2048):
        for batch in (1, 2, 4, 8):
            for N_seq in (1, 6, 256):
                static = Static(UPDATE, Dims(1, N_seq, D, 4, N_seq, 256, 3, False, N_seq), True, None)
                launch = plan_update(static, dtype, {"BLOCK_SIZE_D": columns, "BLOCK_SIZE_B": batch})
                assert D % launch.BLOCK_SIZE_D == 0 and N_seq % launch.BLOCK_SIZE_B == 0
                assert launch.BLOCK_SIZE_D * launch.BLOCK_SIZE_B <= 32 * 128


def test_knobs_are_kept_where_they_fit():
    for rows in (8, 16, 32, 64):
        for columns in (64, 128, 256):
            launch = plan_prefill(static_of(10240, 4), "bfloat16", {"BLOCK_SIZE_T": rows, "BLOCK_SIZE_D": columns})
            assert launch.BLOCK_SIZE_D == columns and launch.BLOCK_SIZE_T == max(rows, 4 * 256 // columns)


BASE = {"op": PREFILL, "W": 4, "D": 10240, "dtype": "bfloat16"}
DECODE = {"op": UPDATE, "W": 4, "D": 10240, "B": 256, "dtype": "bfloat16"}
VARIANTS = [
    BASE | {"sequences": 4, "pool": True},
    BASE | {"D": 5376, "sequences": 4, "initial": True, "sizes": [5120, 128, 128], "chunk_size": 128},
    BASE | {"W": 6, "dtype": "float32", "D": 5376, "sequences": 4, "pool": True},
    BASE | {"W": 2, "B": 2, "T": 4000, "dtype": "float16", "D": 8448, "sizes": [8192, 128, 128]},
    BASE | {"sequences": 2, "T": 250_000, "pool": True},  # more than 2^31 elements
    DECODE | {"W": 6, "dtype": "float32", "packed": True},
    DECODE | {"packed": True, "speculative": True},
]


def rows_of_the_tables() -> list[dict]:
    """Every launch that a table can ask for."""
    rows = []
    for base, knobs in ((BASE, SPECS[PREFILL].pallas_knobs), (DECODE, SPECS[UPDATE].pallas_knobs)):
        values: list[list[int]] = [list(knob.legal) for knob in knobs if not isinstance(knob.legal, type)]
        names = [knob.name for knob in knobs]
        rows += [base | dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
    # A block of a prompt is never wider than 256 channels.
    return [row for row in rows if row["op"] == UPDATE or row["BLOCK_SIZE_D"] <= 256]


def test_the_main_launches_compile_without_spills():
    results = check_gates("sm_90a", [BASE, DECODE, *VARIANTS[:2], VARIANTS[-1]])
    # As many blocks must fit an SM as it takes to cover the memory's latency. A decode block holds the rows of sequences.
    limits = (64, 80, 64, 64)
    for result, registers in zip(results, limits, strict=False):
        assert result["registers"] <= registers and result["shared_bytes"] <= 28 * 1024, result


@pytest.mark.gates
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_120a"])
def test_every_launch_and_option_compiles_without_spills(arch: str):
    check_gates(arch, [*VARIANTS, *rows_of_the_tables()])
