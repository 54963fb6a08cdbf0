"""`pallas_ssm.selective_state_update` against the oracle: the XLA form, and the kernel interpreted with race detection on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_ssm
from ssm_configs import override

from .cases import Case
from .compare import against_oracle
from .inputs import DTYPES, draw
from .interpret_mosaic import RaceError, interpreted
from .operators import OPERATORS, oracle_results
from .oracle.philox import state_bits, stochastic_round
from .runners import jax_runner

OP = "selective_state_update"
BOTH = pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


def runner(implementation: Any):
    interpret = implementation == "mosaic_gpu"
    return jax_runner(OPERATORS[OP], None, interpret, implementation=implementation)


def check(case: Case, implementation: str, seed: int = 0, few: bool = False) -> None:
    """`few`: so few elements that one unlucky rounding is the whole relative error, not an average over many."""
    arguments, keywords = draw(case, seed)
    expected = oracle_results(case, arguments, keywords)
    result = runner(implementation)(arguments, keywords)
    for comparison in against_oracle(case, arguments, keywords, result, expected):
        assert comparison.ok or (few and comparison.error.within(comparison.worst, comparison.worst)), (
            comparison,
            case,
        )


def small(**options) -> Case:
    dims = {"S": 6, "B": 3, "H": 2, "G": 1, "P": 8, "N": 16} | options.pop("dims", {})
    dtypes = {name: options.pop(name) for name in ("dtype", "state_dtype") if name in options}
    full = {"D": True, "dt_bias": True, "dt_softplus": True, "slots": True}
    return Case(OP, "small", dims, **dtypes, options=full | options)


def arrays_of(case: Case):
    arguments, keywords = draw(case)
    return [jnp.asarray(a) for a in arguments], {
        name: jnp.asarray(value) if isinstance(value, np.ndarray) else value for name, value in keywords.items()
    }


def call(implementation: Any, arguments, keywords):
    """The op under a fresh jit (what was traced outside the interpreter would not be interpreted)."""
    static = {name: value for name, value in keywords.items() if not isinstance(value, jax.Array)}
    dynamic = {name: value for name, value in keywords.items() if name not in static}

    def function(arguments, dynamic):
        return pallas_ssm.selective_state_update(*arguments, **dynamic, **static, implementation=implementation)

    if implementation == "xla":
        return jax.jit(function)(arguments, dynamic)
    with interpreted():
        return jax.block_until_ready(jax.jit(function)(arguments, dynamic))


@st.composite
def drawn_cases(draw_from, headdims, dstates) -> Case:
    G = draw_from(st.integers(1, 3))
    names = ("D", "z", "dt_bias", "dt_softplus", "untied", "slots", "dst", "padding")
    options: dict[str, object] = {name: draw_from(st.booleans()) for name in names}
    options["D_per_headdim"] = options["untied"]
    if options["padding"] or options["dst"]:
        options["slots"] = True
    lengths = draw_from(st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=3))
    if lengths is not None:
        options |= {"lengths": tuple(lengths), "tail": draw_from(st.integers(0, 2))}
        if draw_from(st.booleans()):
            options["spec"] = draw_from(st.integers(1, 4))
    dtypes = st.sampled_from(sorted(DTYPES))
    state_dtype = draw_from(dtypes)
    if state_dtype != "float32" and draw_from(st.booleans()):
        options["rounding_seed"] = draw_from(st.integers(0, 2**64 - 1))
    dims = {
        "S": 20, "B": draw_from(st.integers(1, 3)), "H": G * draw_from(st.integers(1, 2)), "G": G,
        "P": draw_from(headdims), "N": draw_from(dstates),
    }  # fmt: skip
    return Case(OP, "drawn", dims, draw_from(dtypes), state_dtype, {k: v for k, v in options.items() if v is not False})


@settings(max_examples=12, deadline=None)
@given(case=drawn_cases(st.integers(1, 20), st.integers(1, 40)), seed=st.integers(0, 100))
def test_drawn_shapes_and_options_xla(case: Case, seed: int):
    check(case, "xla", seed, few=True)


@settings(max_examples=12, deadline=None)
@given(
    case=drawn_cases(st.sampled_from([8, 16, 20, 32, 48]), st.sampled_from([16, 32, 40, 48, 64])),
    seed=st.integers(0, 100),
    knobs=st.fixed_dictionaries(
        {
            "BLOCK_SIZE_M": st.sampled_from([1, 2, 4]),
            "tiles_per_block": st.sampled_from([1, 2, 4]),
            "use_tma": st.booleans(),
        }
    ),
)
def test_drawn_shapes_options_and_launches_mosaic(case: Case, seed: int, knobs):
    try:
        with override(OP, twin="pallas", **knobs):
            check(case, "mosaic_gpu", seed, few=True)
    except NotImplementedError as error:  # what it declines it must decline for a stated reason
        assert "no register layout" in str(error)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_the_result_does_not_depend_on_the_launch(state_dtype):
    arguments, keywords = arrays_of(small(state_dtype=state_dtype, z=True, dims={"P": 32, "N": 32}))
    results = set()
    for rows, tiles, tma in ((4, 1, True), (8, 4, True), (16, 2, False), (32, 2, True), (8, 8, False)):
        with override(OP, twin="pallas", BLOCK_SIZE_M=rows, tiles_per_block=tiles, use_tma=tma):
            y, state = call("mosaic_gpu", arguments, keywords)
        results.add((np.asarray(y).tobytes(), np.asarray(state).tobytes()))
    assert len(results) == 1


@BOTH
@pytest.mark.parametrize("state_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("seed", [0, 2**64 - 1, np.int32(-3), np.uint32(12345)], ids=str)
@pytest.mark.parametrize("N", [16, 48])
def test_stochastic_rounding_gives_the_defined_bits(implementation, state_dtype, seed, N):
    # Few significant bits in x and B make dt·x·B exact in fp32, so that nothing but the rounding is left to differ.
    rng = np.random.default_rng(3)
    S, B, H, P = 5, 3, 2, 16
    x = rng.integers(-127, 128, (B, H, P)).astype(np.float32) / 64
    Bm = (rng.integers(-2047, 2048, (B, 1, N)) / 2.0 ** rng.integers(5, 30, (B, 1, N))).astype(np.float32)
    x[0, 0, :3] = np.inf, np.nan, 2.0**100  # beyond what 16 bits can hold: the ordinary cast
    with np.errstate(invalid="ignore"):
        exact = x[:, :, :, None] * Bm[:, :, None, :]
    state = jnp.zeros((S, H, P, N), state_dtype)
    slots = jnp.array([4, -1, 2], jnp.int32)
    _, new = call(
        implementation,
        [state, *map(jnp.asarray, (x, np.ones((B, H), np.float32), -np.ones(H, np.float32), Bm, np.ones_like(Bm)))],
        {"state_batch_indices": slots, "rounding_seed": jnp.asarray(seed) if isinstance(seed, np.generic) else seed},
    )
    number = int(seed) % 2**32 if isinstance(seed, np.generic) else seed
    for n, slot in ((0, 4), (2, 2)):
        expected = stochastic_round(exact[n], state_bits(number, slot, H, P, N), state_dtype)
        got, nan = np.asarray(new[slot]), np.isnan(exact[n])
        assert got[~nan].tobytes() == expected[~nan].tobytes()
        assert np.isnan(got[nan].astype(np.float32)).all()  # which NaN is nobody's promise
    assert not new[jnp.array([0, 1, 3])].any()


def test_the_bits_are_those_of_the_slot_that_is_written():
    case = small(state_dtype="bfloat16", dst=True, rounding_seed=7, dims={"S": 8, "P": 16})
    arguments, keywords = arrays_of(case)
    moved = dict(keywords) | {"state_batch_indices": keywords["dst_state_batch_indices"]}
    del moved["dst_state_batch_indices"]
    source, target = keywords["state_batch_indices"], keywords["dst_state_batch_indices"]
    elsewhere = [arguments[0].at[target].set(arguments[0][source]), *arguments[1:]]
    for implementation in ("xla", "mosaic_gpu"):
        _, state = call(implementation, arguments, keywords)
        _, in_place = call(implementation, elsewhere, moved)
        assert (state[target] == in_place[target]).all()


@BOTH
@pytest.mark.parametrize("form", ["one token", "packed", "speculative", "speculative, one token"])
def test_slots_past_the_pool_give_nan_and_touch_nothing(implementation, form):
    """Where nothing can be checked in time, under jit."""
    S, T_max = 10, 2
    options: dict[str, object] = {"z": True}
    if form in ("packed", "speculative"):
        options["lengths"] = (2, 1, 3)
    if form.startswith("speculative"):
        options["spec"] = T_max
    arguments, keywords = arrays_of(small(**options, dims={"S": S, "P": 16}))
    source = keywords["state_batch_indices"]
    target = source
    if form == "speculative":
        keywords["num_accepted_tokens"] = jnp.ones(3, jnp.int32)
        source, target = source.at[1, 0].set(S), source.at[2, 1].set(S + 1)
    elif form == "speculative, one token":
        # Starts from its second slot and would store to its first.
        keywords["num_accepted_tokens"] = jnp.full(3, 2, jnp.int32)
        source = target = source.at[1, 1].set(S).at[2, 0].set(S)
    else:
        source, target = source.at[1].set(S), target.at[2].set(2**31 - 1)
    good = call(implementation, arguments, keywords)
    changed = {"state_batch_indices": source} | ({} if target is source else {"dst_state_batch_indices": target})
    bad = call(implementation, arguments, keywords | changed)
    lost = {"one token": [1, 2], "packed": [2, 3, 4, 5], "speculative": [2, 4]}.get(form, [1, 2])
    kept = np.setdiff1d(np.arange(len(arguments[1])), lost)
    assert jnp.isnan(bad[0][np.array(lost)]).all()
    assert (bad[0][kept] == good[0][kept]).all()
    untouched = np.setdiff1d(np.arange(S), np.asarray(target)[np.asarray(target) < S])
    assert (bad[1][untouched] == arguments[0][untouched]).all()
    if form == "one token":
        assert (bad[1][target[0]] == good[1][target[0]]).all()
        assert (bad[1][source[2]] == arguments[0][source[2]]).all()


@BOTH
def test_bounds_out_of_range_are_clamped(implementation):
    arguments, keywords = arrays_of(small(lengths=(1, 2, 1), tail=1, dims={"P": 16}))
    wild = jnp.array([-5, 3, 2, 99], jnp.int32)
    y, state = call(implementation, arguments, keywords | {"cu_seqlens": wild})
    expected_y, expected_state = call(implementation, arguments, keywords | {"cu_seqlens": jnp.array([0, 3, 3, 5])})
    slots = keywords["state_batch_indices"]
    assert (y[:2] == expected_y[:2]).all() and (state[slots[0]] == expected_state[slots[0]]).all()
    assert (state[slots[1]] == arguments[0][slots[1]]).all()
    assert np.isfinite(np.asarray(y, np.float32)).all()


@BOTH
def test_indices_may_be_int64_and_out_of_int32(implementation):
    arguments, keywords = arrays_of(small(dims={"P": 16}))
    with jax.enable_x64(True):
        wide = keywords["state_batch_indices"].astype(jnp.int64)
        expected = call(implementation, arguments, keywords)
        got = call(implementation, arguments, keywords | {"state_batch_indices": wide})
        assert all((a == b).all() for a, b in zip(got, expected, strict=True))
        past = call(implementation, arguments, keywords | {"state_batch_indices": wide.at[0].add(2**32)})
    assert jnp.isnan(past[0][0]).all() and (past[0][1:] == expected[0][1:]).all()
    assert (past[1][wide[0]] == arguments[0][wide[0]]).all()


@BOTH
def test_padding_does_not_look_at_its_operands(implementation):
    """Rows that belong to nobody are poisoned; they must come out zero and leave no trace."""
    case = small(lengths=(2, 1), tail=2, padding=True, dims={"S": 8, "P": 16})
    arguments, keywords = arrays_of(case)
    poisoned = [arguments[0].at[1].set(jnp.nan), arguments[1].at[3:].set(jnp.nan), *arguments[2:]]
    y, state = call(implementation, poisoned, keywords)
    assert not y[3:].any()
    written = np.asarray(keywords["state_batch_indices"])
    written = written[(written >= 0) & (written != keywords["null_slot"])]
    others = np.setdiff1d(np.arange(8), written)
    assert np.asarray(state)[others].tobytes() == np.asarray(poisoned[0])[others].tobytes()
    assert np.isfinite(np.asarray(state)[written]).all()


@BOTH
def test_no_tokens_is_no_work(implementation):
    (state, x, dt, A, B, C), _ = arrays_of(small(slots=False))
    y, new = call(implementation, [state, x[:0], dt[:0], A, B[:0], C[:0]], {})
    assert y.shape == (0, 2, 8) and (new == state).all()
    y, new = call(implementation, [state, x, dt, A, B, C], {"cu_seqlens": jnp.zeros(1, jnp.int32)})
    assert not y.any() and (new == state).all()


def test_strict_promotion_and_64_bit_mode():
    case = small(state_dtype="float16", lengths=(2, 0, 1), tail=1, z=True, rounding_seed=5, dims={"P": 16})
    plain = {name: call(name, *arrays_of(case)) for name in ("xla", "mosaic_gpu")}
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for name, expected in plain.items():
            got = call(name, *arrays_of(case))
            assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(got, expected, strict=True))


def test_the_race_detector_is_on():
    """A kernel with a race must not pass, nor one that another follows; otherwise the tests above would prove nothing about
    synchronisation."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def waits(x, y, shared, barrier):
        plgpu.copy_gmem_to_smem(x, shared, barrier)
        plgpu.barrier_wait(barrier)
        y[...] = shared[...]

    def forgets_to_wait(x, y, shared, barrier):
        plgpu.copy_gmem_to_smem(x, shared, barrier)
        y[...] = shared[...]
        plgpu.barrier_wait(barrier)

    x = jnp.arange(128, dtype=jnp.float32)
    scratch = [plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()]
    right, wrong = (plgpu.kernel(body, out_type=x, scratch_types=scratch) for body in (waits, forgets_to_wait))
    with pytest.raises(RaceError), interpreted():
        jax.block_until_ready(jax.jit(lambda x: right(wrong(x)))(x))
    with interpreted():
        jax.block_until_ready(jax.jit(right)(x))


ERRORS = {
    "state rank": (lambda a, k: a.__setitem__(0, a[0][0, 0]), ValueError, r"state: expected rank 4 .* got rank 2"),
    "x rank": (lambda a, k: a.__setitem__(1, a[1][0]), ValueError, r"x: expected rank 3 \[T, H, P\], got rank 2"),
    "dt shape": (lambda a, k: a.__setitem__(2, a[2][:2]), ValueError, r"dt: expected shape \(T=3, H=2\) or"),
    "A shape": (lambda a, k: a.__setitem__(3, a[3][:1]), ValueError, r"A: expected shape \(H=2,\) or .* got \(1,\)"),
    "H not divisible by G": (
        lambda a, k: a.__setitem__(4, jnp.repeat(a[4], 3, 1)),
        ValueError, r"B: expected shape \(T=3, G, N=16\) with H=2 divisible by G, got \(3, 3, 16\)",
    ),
    "C shape": (lambda a, k: a.__setitem__(5, a[5][:, :, 1:]), ValueError, r"C: expected shape \(T=3, G=1, N=16\), got"),
    "state dtype": (lambda a, k: a.__setitem__(0, a[0].astype(int)), TypeError, r"state: expected dtype .* got int32"),
    "x dtype": (lambda a, k: a.__setitem__(1, a[1].astype(int)), TypeError, r"x: expected dtype float32 or .* got int32"),
    "index dtype": (
        lambda a, k: k.update(state_batch_indices=k["state_batch_indices"].astype(float)),
        TypeError, r"state_batch_indices: expected dtype int32 or int64, got float32",
    ),
    "not an array": (lambda a, k: a.__setitem__(3, -1.0), TypeError, r"A: expected an array, got float"),
    "nothing": (lambda a, k: a.__setitem__(3, None), TypeError, r"A: expected an array, got None"),
    "1-D slots in speculative decode": (
        lambda a, k: k.update(num_accepted_tokens=jnp.ones(3, jnp.int32)),
        ValueError, r"state_batch_indices: expected shape \(N_seq=3, T_max\) with num_accepted_tokens",
    ),
    "no slots in speculative decode": (
        lambda a, k: (k.pop("state_batch_indices"), k.update(num_accepted_tokens=jnp.ones(3, jnp.int32))),
        ValueError, r"state_batch_indices: expected shape \(N_seq, T_max\) .* got None",
    ),
    "2-D slots": (
        lambda a, k: k.update(state_batch_indices=k["state_batch_indices"][:, None]),
        ValueError, r"state_batch_indices: expected shape \(N_seq=3,\), got \(3, 1\)",
    ),
    "slot beyond the pool": (
        lambda a, k: k.update(state_batch_indices=k["state_batch_indices"].at[1].set(6)),
        ValueError, r"state_batch_indices: expected slots < S=6, got 6",
    ),
    "destination beyond the pool": (
        lambda a, k: k.update(dst_state_batch_indices=np.asarray(k["state_batch_indices"]) + 6),
        ValueError, r"dst_state_batch_indices: expected slots < S=6",
    ),
    "too few slots": (
        lambda a, k: (k.pop("state_batch_indices"), a.__setitem__(0, a[0][:2])),
        ValueError, r"state: expected at least one slot for each of 3 sequences, got S=2",
    ),
    "destination without source": (
        lambda a, k: k.update(dst_state_batch_indices=k.pop("state_batch_indices")),
        ValueError, r"dst_state_batch_indices: expected None without state_batch_indices",
    ),
    "null slot without slots": (
        lambda a, k: (k.pop("state_batch_indices"), k.update(null_slot=0)),
        ValueError, r"null_slot: expected None without state_batch_indices, got 0",
    ),
    "null slot type": (lambda a, k: k.update(null_slot=1.0), TypeError, r"null_slot: expected an int or None, got float"),
    "null slot of many bits": (
        lambda a, k: k.update(null_slot=2**31), ValueError, r"null_slot: expected a slot number of 32 bits, got 2147483648",
    ),
    "seed with fp32": (lambda a, k: k.update(rounding_seed=1), ValueError, r"rounding_seed: expected None with a float32"),
    "seed type": (
        lambda a, k: (a.__setitem__(0, a[0].astype(jnp.float16)), k.update(rounding_seed=1.5)),
        TypeError, r"rounding_seed: expected an int.* got float",
    ),
    "seed range": (
        lambda a, k: (a.__setitem__(0, a[0].astype(jnp.float16)), k.update(rounding_seed=2**64)),
        ValueError, r"rounding_seed: expected 0 <= seed < 2\*\*64",
    ),
    "seed shape": (
        lambda a, k: (a.__setitem__(0, a[0].astype(jnp.float16)), k.update(rounding_seed=jnp.ones(2, jnp.uint32))),
        ValueError, r"rounding_seed: expected a scalar .* got shape \(2,\) uint32",
    ),
    "softplus type": (lambda a, k: k.update(dt_softplus=1), TypeError, r"dt_softplus: expected a bool, got int"),
    "D shape": (lambda a, k: k.update(D=k["D"][:1]), ValueError, r"D: expected shape \(H=2,\) or \(H=2, P=8\), got \(1,\)"),
    "z shape": (lambda a, k: k.update(z=a[1][:, :1]), ValueError, r"z: expected shape \(T=3, H=2, P=8\), got"),
    "cu_seqlens descend": (
        lambda a, k: k.update(cu_seqlens=jnp.array([0, 2, 1, 3], jnp.int32)),
        ValueError, r"cu_seqlens: expected 0 <= … <= T=3 without a descent, got \[0, 2, 1, 3\]",
    ),
    "cu_seqlens rank": (
        lambda a, k: k.update(cu_seqlens=jnp.zeros((1, 4), jnp.int32)), ValueError, r"cu_seqlens: expected rank 1"
    ),
    "implementation": (
        lambda a, k: k.update(implementation="triton"), ValueError, r"implementation: expected one of .* got 'triton'"
    ),
    "the kernel on a CPU": (
        lambda a, k: k.update(implementation="mosaic_gpu"),
        NotImplementedError, r"the mosaic_gpu kernel does not run on a CPU outside plgpu.force_gpu_interpret_mode",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_and_touch_nothing(name):
    spoil, kind, text = ERRORS[name]
    arguments, keywords = arrays_of(small())
    spoil(arguments, keywords)
    before = np.array(arguments[0])
    with pytest.raises(kind, match=text):
        pallas_ssm.selective_state_update(*arguments, **keywords)
    assert np.asarray(arguments[0]).tobytes() == before.tobytes()
