"""Gradients and batching of `pallas_ssm`'s SSD operators, by the XLA form and through the kernels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_ssm

from . import oracle
from .cases import Case
from .inputs import draw
from .interpret_mosaic import interpreted
from .operators import OPERATORS

COMBINED = "mamba_chunk_scan_combined"
NAMES = {
    "ssd.chunk_cumsum": ("dt", "A"),
    "ssd.chunk_state": ("x", "B", "dt", "dA_cumsum"),
    "ssd.state_passing": ("states", "dA_cumsum"),
    "ssd.bmm_chunk": ("C", "B"),
    "ssd.chunk_scan": ("CB", "x", "dt", "dA_cumsum", "C", "states"),
    COMBINED: ("x", "dt", "A", "B", "C"),
}
FULL: dict[str, Any] = {"D": True, "z": True, "initial": True, "slow": True}
FORMS: dict[str, dict[str, Any]] = {
    "dense": FULL | {"B": 2, "T": 21},
    "packed": FULL | {"lengths": (9, 0, 18), "tail": 2},
    "every option": FULL | {
        "lengths": (17, 3), "D_per_headdim": True, "return_intermediate_states": True, "dt_limit": (0.005, 0.02),
    },
    "aligned, bare": {"lengths": (5, 17), "chunk_aligned": True},
}  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]


def problem(op: str, options: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(float arguments by name, the other arguments)."""
    options = dict(options)
    lengths, tail = options.get("lengths"), options.get("tail", 0)
    T = options.pop("T", sum(lengths or ()) + tail)
    dims = {"B": options.pop("B", 1), "T": T, "H": 2, "G": 1, "P": 4, "N": 4, "L": 16}
    arguments, keywords = draw(Case(op, "gradient", dims, "float32", "float32", options))
    named = dict(zip(NAMES[op], arguments, strict=True)) | keywords
    floats = {n: a for n, a in named.items() if isinstance(a, np.ndarray) and np.issubdtype(a.dtype, np.floating)}
    # Slots without a chunk hold NaN in the definitions; they have no meaning.
    return floats, {name: value for name, value in named.items() if name not in floats}


def loss(function: Any, floats: Any, others: Any, weights: list[Any], meant: list[Any]) -> Any:
    """Sees every result, but only where it has a meaning."""
    results = [result for result in _tuple(function(**floats, **others)) if result is not None]
    total = 0.0
    for result, weight, where in zip(results, weights, meant, strict=True):
        total = total + (result[where] * weight[where]).sum()
    return total


def _tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def weighted(op: str, floats: Any, others: Any) -> tuple[Any, list[np.ndarray], list[np.ndarray]]:
    """(the definition, weights of a loss, where its results have a meaning)."""
    definition = OPERATORS[op].function(oracle, others)
    keywords = {name: value for name, value in others.items() if name != "return_final_states"}

    def defined(**arrays: Any) -> Any:
        merged = {**arrays, **keywords}
        required = [merged.pop(name) for name in NAMES[op]]
        return definition(*required, **merged)

    results = _tuple(defined(**floats))
    rng = np.random.default_rng(1)
    return (
        defined,
        [rng.standard_normal(result.shape) for result in results],
        [~np.isnan(result) for result in results],
    )


def gradients(op: str, floats: Any, others: Any, weights: Any, meant: Any, implementation: Any = "xla") -> Any:
    function = OPERATORS[op].function(pallas_ssm, others)
    weights = [jnp.asarray(weight, jnp.float32) for weight in weights]

    def seen(floats: Any) -> Any:
        results = [r for r in _tuple(function(**floats, **others, implementation=implementation)) if r is not None]
        pairs = zip(results, weights, meant, strict=True)
        return sum(jnp.where(where, result * weight, 0).sum() for result, weight, where in pairs)

    compute = jax.jit(jax.grad(seen))
    if implementation == "xla":
        return compute(floats)
    with interpreted():
        return jax.block_until_ready(compute(floats))


def forms(op: str) -> list[str]:
    return list(FORMS) if op == COMBINED else ["dense", "packed"]


@pytest.mark.parametrize("op, form", [(op, form) for op in NAMES for form in forms(op)])
def test_every_float_argument_against_finite_differences_of_the_oracle(op, form):
    # A stage sees dA_cumsum itself, and a corner where it stands still: not within the step of a decay that is quick.
    floats, others = problem(op, FORMS[form] | ({} if op == COMBINED else {"slow": False}))
    floats = {name: np.nan_to_num(array) for name, array in floats.items()}
    defined, weights, meant = weighted(op, floats, others)
    got = gradients(op, floats, others, weights, meant)
    assert set(got) == set(floats)
    exact = {name: array.astype(np.float64) for name, array in floats.items()}
    rng = np.random.default_rng(2)
    for name, array in exact.items():
        direction = rng.standard_normal(array.shape)
        if name == "dA_cumsum":
            # Downwards, or the least of a difference and 0 has a corner within the step.
            direction = -np.cumsum(np.abs(direction), axis=-1)
        h = 1e-6 if "dt_limit" in others else 1e-5
        ahead, behind = (
            loss(defined, exact | {name: array + sign * h * direction}, {}, weights, meant) for sign in (1, -1)
        )
        expected = (ahead - behind) / (2 * h)
        gradient = np.asarray(got[name], np.float64)
        # The sum along a direction cancels; what was summed is the measure of its error.
        scale = np.abs(gradient * direction).sum()
        assert abs((gradient * direction).sum() - expected) <= 5e-6 * scale + 1e-9, name


def test_no_step_at_all_has_a_whole_gradient():
    """dt = 0 makes neighbours' decays equal, where the least of their difference and 0 has a corner."""
    floats, others = problem(COMBINED, {"T": 20, "dt_softplus": False, "D": True, "slow": True})
    floats["dt"] = floats["dt"].copy()
    floats["dt"][:, 5:9] = 0
    defined, weights, meant = weighted(COMBINED, floats, others)
    got = gradients(COMBINED, floats, others, weights, meant)
    exact = {name: array.astype(np.float64) for name, array in floats.items()}
    step = np.zeros(exact["dt"].shape)
    step[:, 5:9] = 1e-6
    ahead = loss(defined, exact | {"dt": exact["dt"] + step}, {}, weights, meant)
    here = loss(defined, exact, {}, weights, meant)
    # dt may only grow from 0.
    np.testing.assert_allclose(np.asarray(got["dt"])[:, 5:9].sum(), (ahead - here) / 1e-6, rtol=1e-4)


def test_what_nobody_reads_reaches_no_gradient():
    floats, others = problem(COMBINED, FORMS["packed"])
    _, weights, meant = weighted(COMBINED, floats, others)
    clean = gradients(COMBINED, floats, others, weights, meant)
    poisoned = {name: array.copy() for name, array in floats.items()}
    for name in ("x", "dt", "B", "C", "z"):
        poisoned[name][:, 27:] = np.nan
    got = gradients(COMBINED, poisoned, others, weights, meant)
    for name in floats:
        assert np.isfinite(np.asarray(got[name])).all() and (np.asarray(got[name]) == np.asarray(clean[name])).all()
    assert not any(np.asarray(clean[name])[:, 27:].any() for name in ("x", "dt", "B", "C", "z"))


def test_forward_mode_and_second_derivatives():
    floats, others = problem(COMBINED, FORMS["dense"])
    del floats["z"]

    def total(x: jax.Array) -> jax.Array:
        function: Any = pallas_ssm.mamba_chunk_scan_combined
        y, final = function(**(floats | {"x": x}), **others, implementation="xla")
        return (y**2).sum() + (final**2).sum()

    x = jnp.asarray(floats["x"])
    direction = jnp.asarray(np.random.default_rng(0).standard_normal(x.shape), jnp.float32)
    _, forward = jax.jvp(total, (x,), (direction,))
    np.testing.assert_allclose(forward, (jax.grad(total)(x) * direction).sum(), rtol=1e-4)
    # It is of second degree in x, so that the gradient is linear but for what it is at 0.
    _, along = jax.jvp(jax.grad(total), (x,), (x,))
    expected = jax.grad(total)(x) - jax.grad(total)(jnp.zeros_like(x))
    np.testing.assert_allclose(along, expected, rtol=1e-3, atol=1e-3)


def test_cu_seqlens_take_no_gradient():
    floats, others = problem(COMBINED, FORMS["packed"])
    bounds = others.pop("cu_seqlens")
    _, pullback = jax.vjp(
        lambda bounds: pallas_ssm.mamba_chunk_scan_combined(**floats, **others, cu_seqlens=bounds)[0].sum(), bounds
    )
    (cotangent,) = pullback(jnp.float32(1))
    assert cotangent.dtype == jax.dtypes.float0


@pytest.mark.parametrize("op", NAMES)
def test_vmap(op):
    floats, others = problem(op, FORMS["packed"])
    floats = {name: jnp.nan_to_num(array) for name, array in floats.items()}
    function = OPERATORS[op].function(pallas_ssm, others)
    first = NAMES[op][0]
    batch = jnp.stack([floats[first], 2 * floats[first]])

    def call(array: jax.Array) -> Any:
        results = _tuple(function(**(floats | {first: array}), **others, implementation="xla"))
        return [result for result in results if result is not None]

    for i, results in enumerate(call(array) for array in batch):
        for got, expected in zip(jax.vmap(call)(batch), results, strict=True):
            np.testing.assert_allclose(got[i], expected, rtol=2e-5, atol=2e-6)
