"""Gradients and batching of `pallas_ssm.selective_state_update`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_ssm

from . import oracle
from .cases import Case
from .inputs import draw
from .interpret_mosaic import interpreted

OP = "selective_state_update"
FORMS = {
    "one token": {"dst": True, "slots": True},
    "no slots": {},
    "untied": {"untied": True, "D_per_headdim": True, "slots": True},
    "packed": {"slots": True, "lengths": (2, 0, 1, 3), "tail": 1},
    "speculative": {"spec": 2, "lengths": (2, 0, 3)},
    "padding": {"slots": True, "padding": True, "lengths": (1, 2, 1)},
    "head-less": {"headless": True, "slots": True},
}
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


def problem(options, state_dtype="float32"):
    """(float arguments by name, the other arguments, weights of a scalar loss)."""
    heads = {"H": 1, "G": 1} if options.get("headless") else {"H": 2, "G": 1}
    case = Case(
        OP, "gradient", {"S": 12, "B": 3, "P": 16, "N": 16} | heads, "float32", state_dtype,
        {"D": True, "z": True, "dt_bias": True, "dt_softplus": True} | options,
    )  # fmt: skip
    arguments, keywords = draw(case)
    named = dict(zip(("state", "x", "dt", "A", "B", "C"), arguments, strict=True)) | keywords
    floats = {n: a for n, a in named.items() if isinstance(a, np.ndarray) and not np.issubdtype(a.dtype, np.integer)}
    others = {name: value for name, value in named.items() if name not in floats}
    rng = np.random.default_rng(1)
    weights = rng.standard_normal(floats["x"].shape), rng.standard_normal(floats["state"].shape)
    return floats, others, weights


def loss(function, weights, floats, others):
    """Sees y and the new state."""
    floats = dict(floats)
    arguments = [floats.pop(name) for name in ("state", "x", "dt", "A", "B", "C")]
    y, state = function(*arguments, **floats, **others)
    return (y * weights[0]).sum() + (state * weights[1]).sum()


def gradients(floats, others, weights, implementation):
    function = functools.partial(pallas_ssm.selective_state_update, implementation=implementation)
    weights = [jnp.asarray(weight, jnp.float32) for weight in weights]
    compute = jax.jit(jax.grad(lambda floats: loss(function, weights, floats, others)))
    if implementation == "xla":
        return compute(floats)
    with interpreted():
        return jax.block_until_ready(compute(floats))


@pytest.mark.parametrize("form", FORMS)
def test_every_float_argument_against_finite_differences_of_the_oracle(form):
    floats, others, weights = problem(FORMS[form])
    got = gradients(floats, others, weights, "xla")
    assert set(got) == set(floats)
    exact = {name: array.astype(np.float64) for name, array in floats.items()}
    rng = np.random.default_rng(2)
    for name, array in exact.items():
        direction = rng.standard_normal(array.shape)
        ahead, behind = (
            loss(oracle.selective_state_update, weights, exact | {name: array + h * direction}, others)
            for h in (1e-5, -1e-5)
        )
        expected = (ahead - behind) / 2e-5
        # The sum along a direction cancels; what was summed is the measure of its error.
        scale = np.abs(np.asarray(got[name], np.float64) * direction).sum()
        assert abs((np.asarray(got[name], np.float64) * direction).sum() - expected) < 2e-6 * scale, name


@pytest.mark.parametrize("form", ["one token", "speculative"])
def test_both_implementations_have_the_same_backward_pass(form):
    floats, others, weights = problem(FORMS[form])
    by_xla = gradients(floats, others, weights, "xla")
    by_kernel = gradients(floats, others, weights, "mosaic_gpu")
    assert all((by_xla[name] == by_kernel[name]).all() for name in floats)


def test_what_padding_holds_reaches_no_gradient():
    floats, others, weights = problem(FORMS["padding"])
    clean = gradients(floats, others, weights, "xla")
    padded = np.flatnonzero(np.repeat(np.asarray(others["state_batch_indices"]) < 0, (1, 2, 1)))
    assert len(padded)
    for name in ("x", "dt", "B", "C", "z"):
        floats[name] = floats[name].copy()
        floats[name][padded] = np.nan
    poisoned = gradients(floats, others, weights, "xla")
    assert all(np.isfinite(np.asarray(poisoned[name])).all() for name in floats)
    assert all((poisoned[name] == clean[name]).all() for name in ("state", "A", "D", "dt_bias"))
    assert not any(np.asarray(clean[name])[padded].any() for name in ("x", "dt", "B", "C", "z"))


def test_rounding_counts_as_the_identity():
    floats, others, weights = problem(FORMS["one token"], state_dtype="bfloat16")
    nearest = gradients(floats, others, weights, "xla")
    stochastic = gradients(floats, others | {"rounding_seed": 3}, weights, "xla")
    assert all((nearest[name] == stochastic[name]).all() for name in floats)
    assert np.asarray(nearest["state"]).dtype == floats["state"].dtype


def test_steps_that_underflow_have_a_gradient():
    """softplus of a very negative step: a division by zero on the way would make NaN of it."""
    floats, others, weights = problem(FORMS["one token"])
    floats["dt"] = np.full_like(floats["dt"], -40.0)
    got = gradients(floats, others, weights, "xla")
    assert all(np.isfinite(np.asarray(value)).all() for value in got.values())
    assert np.asarray(got["dt"]).any()


def test_index_arguments_take_no_gradient():
    floats, others, weights = problem(FORMS["packed"])
    _, pullback = jax.vjp(
        lambda cu_seqlens: loss(
            pallas_ssm.selective_state_update, weights, floats, others | {"cu_seqlens": cu_seqlens}
        ),
        others["cu_seqlens"],
    )
    (cotangent,) = pullback(jnp.float32(1))
    assert cotangent.dtype == jax.dtypes.float0


@pytest.mark.parametrize("form", ["one token", "packed"])
def test_vmap(form):
    floats, others, _ = problem(FORMS[form])
    arguments = [jnp.asarray(floats.pop(name)) for name in ("state", "x", "dt", "A", "B", "C")]
    batch = jnp.stack([arguments[1], 2 * arguments[1], -arguments[1]])

    def call(x, implementation):
        return pallas_ssm.selective_state_update(
            arguments[0], x, *arguments[2:], **floats, **others, implementation=implementation
        )

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


def test_a_gradient_of_a_batch():
    floats, others, weights = problem(FORMS["one token"])
    batch = jnp.stack([floats["x"], 2 * floats["x"]])

    gradient = jax.grad(lambda x: loss(pallas_ssm.selective_state_update, weights, floats | {"x": x}, others))
    one, several = jax.jit(gradient), jax.jit(jax.vmap(gradient))(batch)
    for i, x in enumerate(batch):
        np.testing.assert_allclose(several[i], one(x), rtol=1e-5, atol=1e-6)
