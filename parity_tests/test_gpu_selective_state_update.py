"""What only a GPU shows of `selective_state_update`: 64-bit offsets, slots out of range, rounding in both twins."""

import numpy as np
import pytest

from . import runners
from .cases import select
from .inputs import draw

pytestmark = pytest.mark.gpu
OP = "selective_state_update"


@pytest.fixture(scope="module")
def twins():
    return runners.twins(OP, interpret=False)


def _large_pool_cases():
    return [case for case in select(op=OP, tags=("large",)) if "2^31" in case.name]


def _compact(case):
    """The case on a pool of just the slots it uses, and where those lie in the large pool."""
    B = case.dims["B"]
    arguments, keywords = draw(case.with_dims(S=B))
    high = np.sort(np.random.default_rng(0).choice(np.arange(case.dims["S"] - 64, case.dims["S"]), B, replace=False))
    return arguments, keywords, high.astype(np.int32)


@pytest.mark.parametrize("case", _large_pool_cases(), ids=str)
def test_more_than_2_31_elements_triton(case, twins):
    import torch

    import triton_ssm

    arguments, keywords, high = _compact(case)
    reference = twins["triton"](arguments, keywords)
    dtype = getattr(torch, case.state_dtype)
    torch.manual_seed(0)
    pool = torch.randn(case.dims["S"], *arguments[0].shape[1:], device="cuda", dtype=dtype)
    assert pool.numel() > 2**31
    slots = torch.from_numpy(high).cuda().long()
    pool[slots] = runners.to_torch(arguments[0], "cuda")
    before = pool.clone()
    named = {name: runners.to_torch(value, "cuda") for name, value in keywords.items()}
    named["state_batch_indices"] = slots[named["state_batch_indices"].long()].int()
    y = triton_ssm.selective_state_update(pool, *(runners.to_torch(a, "cuda") for a in arguments[1:]), **named)
    assert runners.from_torch(y).tobytes() == reference["y"].tobytes()
    assert runners.from_torch(pool[slots]).tobytes() == reference["state"].tobytes()
    pool[slots] = before[slots]
    assert all(torch.equal(a, b) for a, b in zip(pool.split(100), before.split(100), strict=True))


@pytest.mark.parametrize("case", _large_pool_cases(), ids=str)
def test_more_than_2_31_elements_pallas(case, twins):
    import functools

    import jax
    import jax.numpy as jnp

    import pallas_ssm

    arguments, keywords, high = _compact(case)
    reference = twins["mosaic_gpu"](arguments, keywords)
    shape = (case.dims["S"], *arguments[0].shape[1:])
    state = jnp.array(arguments[0])

    @functools.partial(jax.jit, donate_argnums=0)
    def place(pool):
        return pool.at[high].set(state)

    def fresh():
        return jax.jit(lambda key: jax.random.normal(key, shape, state.dtype))(jax.random.key(0))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(pool, others, named):
        return pallas_ssm.selective_state_update(
            pool, *others, **named, dt_softplus=keywords["dt_softplus"], implementation="mosaic_gpu"
        )

    named = {name: jnp.array(value) for name, value in keywords.items() if isinstance(value, np.ndarray)}
    named["state_batch_indices"] = jnp.array(high)[named["state_batch_indices"]]
    y, pool = update(place(fresh()), [jnp.array(a) for a in arguments[1:]], named)
    assert np.asarray(y).tobytes() == reference["y"].tobytes()
    assert np.asarray(pool[high]).tobytes() == reference["state"].tobytes()
    restored = place(pool)
    same = jax.jit(lambda a, b: jnp.array_equal(a, b))
    assert bool(same(restored, place(fresh())))


def test_a_slot_beyond_the_pool_gives_nan_and_touches_nothing(twins):
    case = next(case for case in select(op=OP, tags=("odd",)) if case.name == "gate z, bf16 state")
    arguments, keywords = draw(case)
    keywords["state_batch_indices"][1] = case.dims["S"]
    for name, run in twins.items():
        y, state = run(arguments, keywords).values()
        assert np.isnan(y[1].astype(np.float32)).all(), name
        assert not np.isnan(np.delete(y, 1, axis=0).astype(np.float32)).any(), name
        live = np.delete(keywords["state_batch_indices"], 1)
        untouched = np.setdiff1d(np.arange(case.dims["S"]), live)
        assert state[untouched].tobytes() == arguments[0][untouched].tobytes(), name


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float16"])
def test_stochastic_rounding_is_the_same_in_both_twins(state_dtype, twins):
    """Exactly representable products leave nothing but the rounding to differ."""
    import ml_dtypes

    rng = np.random.default_rng(5)
    S, B, H, P, N = 9, 4, 4, 64, 128
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[state_dtype]
    x = (rng.integers(-127, 128, (B, H, P)) / 64).astype(np.float32)
    Bm = (rng.integers(-2047, 2048, (B, 1, N)) / 2.0 ** rng.integers(5, 30, (B, 1, N))).astype(np.float32)
    arguments = (
        np.zeros((S, H, P, N), dtype), x, np.ones((B, H), np.float32), -np.ones(H, np.float32), Bm,
        np.ones((B, 1, N), np.float32),
    )  # fmt: skip
    keywords = {"state_batch_indices": rng.permutation(S)[:B].astype(np.int32), "rounding_seed": 77}
    states = {name: run(arguments, keywords)["state"].tobytes() for name, run in twins.items()}
    assert len(set(states.values())) == 1, {name: hash(value) for name, value in states.items()}
