"""The Mosaic GPU kernels of the SSD stages, interpreted with race detection on: each alone, and all for the whole operator.

The registry's cases are in test_twins.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_ssm
from ssm_configs import override

from .cases import SSD_STAGES, Case
from .compare import against_oracle
from .inputs import draw
from .interpret_mosaic import interpreted
from .operators import OPERATORS, oracle_results
from .runners import jax_runner

COMBINED = "mamba_chunk_scan_combined"
NAMES = {
    "ssd.chunk_cumsum": ("dt", "A"),
    "ssd.chunk_state": ("x", "B", "dt", "dA_cumsum"),
    "ssd.state_passing": ("states", "dA_cumsum"),
    "ssd.bmm_chunk": ("C", "B"),
    "ssd.chunk_scan": ("CB", "x", "dt", "dA_cumsum", "C", "states"),
    COMBINED: ("x", "dt", "A", "B", "C"),
}
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


def check(case: Case) -> None:
    arguments, keywords = draw(case)
    result = jax_runner(OPERATORS[case.op], None, True, implementation="mosaic_gpu")(arguments, keywords)
    for comparison in against_oracle(case, arguments, keywords, result, oracle_results(case, arguments, keywords)):
        assert comparison.ok, (comparison, case)


@pytest.mark.parametrize("op", SSD_STAGES)
@pytest.mark.parametrize("lengths", [None, (3, 0, 90)])
def test_two_tiles_of_everything(op, lengths):
    """More channels, states and tokens of a chunk than one tile has."""
    dims = {"B": 1, "T": 97 if lengths else 70, "H": 2, "G": 2, "P": 128, "N": 128, "L": 128}
    options = {"initial": True, "D": True, "D_per_headdim": True, "slow": True, "dt_limit": (0.001, 0.02)}
    if lengths:
        options |= {"lengths": lengths, "tail": 4}
    check(Case(op, "tiles", dims, "bfloat16", "float32", options))


FORMS: dict[str, dict[str, Any]] = {
    "dense": {"B": 2, "T": 140, "z": True},
    "short": {"T": 40, "D_per_headdim": True},
    "packed": {"lengths": (70, 0, 9, 64), "tail": 7, "initial": True, "poison": True, "slow": True},
    "aligned": {"lengths": (40, 30), "tail": 2, "chunk_aligned": True, "L": 16},
}


def whole(form: str, dtype: str = "bfloat16", **options: Any) -> Case:
    options = {"D": True} | FORMS[form] | options
    T = options.pop("T", sum(options.get("lengths", ())) + options.get("tail", 0))
    dims = {"B": options.pop("B", 1), "T": T, "H": 2, "G": 1, "P": 64, "N": 64, "L": options.pop("L", 64)}
    return Case(COMBINED, form, dims, dtype, "float32", options)


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_operator_in_stages(form):
    with override(COMBINED, twin="pallas", FUSED=False):
        check(whole(form))


def arrays_of(case: Case) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """(arrays, other arguments), by name."""
    arguments, keywords = draw(case)
    named = dict(zip(NAMES[case.op], arguments, strict=True)) | keywords
    arrays = {name: jnp.asarray(value) for name, value in named.items() if isinstance(value, np.ndarray)}
    return arrays, {name: value for name, value in named.items() if name not in arrays}


def in_stages(arrays: dict[str, jax.Array], others: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    def run(arrays: dict[str, jax.Array]) -> Any:
        return pallas_ssm.mamba_chunk_scan_combined(**arrays, **others, implementation="mosaic_gpu")

    with interpreted(), override(COMBINED, twin="pallas", FUSED=False):
        return jax.block_until_ready(jax.jit(run)(arrays))


def same(first: Any, second: Any) -> bool:
    return np.asarray(first).tobytes() == np.asarray(second).tobytes()


def test_nan_stays_in_its_own_sequence_and_neighbours_do_not_matter():
    arrays, others = arrays_of(whole("packed", poison=False, z=True))
    y, final = in_stages(arrays, others)
    bad = {name: arrays[name].at[:, :70].set(jnp.nan) for name in ("x", "dt", "B", "C", "z")}
    bad = {name: array.at[:, 143:].set(jnp.nan) for name, array in bad.items()}
    bad["initial_states"] = arrays["initial_states"].at[0].set(jnp.nan)
    bad_y, bad_final = in_stages(arrays | bad, others)
    assert same(bad_y[:, 70:], y[:, 70:]) and same(bad_final[1:], final[1:]) and not bad_y[:, 143:].any()

    # Alone, a sequence has the same bits.
    alone = {name: arrays[name][:, 79:143] for name in ("x", "dt", "B", "C", "z")}
    alone["initial_states"] = arrays["initial_states"][3:]
    rest = {name: arrays[name] for name in arrays if name not in (*alone, "cu_seqlens")}
    dense_y, dense_final = in_stages(alone | rest | {"cu_seqlens": jnp.array([0, 64], jnp.int32)}, others)
    assert dense_y.shape == (1, 64, 2, 64)
    np.testing.assert_allclose(
        np.asarray(dense_y, np.float32), np.asarray(y[:, 79:143], np.float32), rtol=2e-2, atol=2e-2
    )
    np.testing.assert_allclose(dense_final[0], final[3], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bounds", [(0, 0, 0, 0, 0), (-9, 70, 70, 999, 2**31 - 1), (0, 150, 150, 150, 150)])
def test_whatever_the_bounds_are_nothing_outside_is_touched(bounds):
    """The interpreter stops at any access out of bounds, and finds what two blocks write."""
    arrays, others = arrays_of(whole("packed", poison=False))
    y, final = in_stages(arrays | {"cu_seqlens": jnp.array(bounds, jnp.int32)}, others)
    if bounds[-1] == 0:
        assert not y.any() and same(final, arrays["initial_states"])
    elif bounds[1] == 150:
        assert jnp.isfinite(y).all() and y[0, 149].any() and same(final[1:], arrays["initial_states"][1:])


@pytest.mark.parametrize("op", SSD_STAGES)
def test_gradients_are_those_of_the_xla_form(op):
    dims = {"B": 1, "T": 70, "H": 2, "G": 1, "P": 64, "N": 64, "L": 64}
    arrays, others = arrays_of(Case(op, "gradient", dims, "bfloat16", "float32", {"D": True, "initial": True}))

    def gradient(implementation: str) -> Any:
        def total(arrays: dict[str, jax.Array]) -> Any:
            function = OPERATORS[op].function(pallas_ssm, others)
            results = function(**arrays, **others, implementation=implementation)
            return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(results))

        return jax.jit(jax.grad(total))(arrays)

    expected = gradient("xla")
    with interpreted():
        got = jax.block_until_ready(gradient("mosaic_gpu"))
    assert all(same(got[name], expected[name]) for name in arrays)


@pytest.mark.parametrize("op", SSD_STAGES)
def test_a_batch_of_calls_takes_xla_or_refuses(op):
    dims = {"B": 1, "T": 70, "H": 2, "G": 1, "P": 64, "N": 64, "L": 64}
    arrays, others = arrays_of(Case(op, "vmap", dims, "bfloat16"))
    first = NAMES[op][0]

    def run(implementation: Any) -> Any:
        function = OPERATORS[op].function(pallas_ssm, others)
        call = jax.vmap(lambda array: function(**(arrays | {first: array}), **others, implementation=implementation))
        return jax.jit(call)(jnp.stack([arrays[first], arrays[first]]))

    expected = run("xla")
    with interpreted():
        got = jax.block_until_ready(run(None))
        with pytest.raises(NotImplementedError, match=rf"^{op}: the mosaic_gpu kernel is not batched by jax\.vmap"):
            run("mosaic_gpu")
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert same(one, other)


@pytest.mark.parametrize(
    "op, sizes, reason",
    [
        ("ssd.chunk_cumsum", {"L": 32}, "needs chunk_size >= 64, got 32"),
        ("ssd.chunk_state", {"P": 80}, "needs P in multiples of 64, got 80"),
        ("ssd.chunk_state", {"N": 96}, "needs N in multiples of 64 up to 256, got 96"),
        ("ssd.state_passing", {"P": 3, "N": 5}, "needs P x N divisible by 128, got P=3, N=5"),
        ("ssd.bmm_chunk", {"L": 16}, "needs chunk_size >= 64, got 16"),
        ("ssd.chunk_scan", {"N": 320}, "needs N in multiples of 64 up to 256, got 320"),
    ],
)
def test_what_a_kernel_does_not_take(op, sizes, reason):
    dims = {"B": 1, "T": 20, "H": 1, "G": 1, "P": 64, "N": 64, "L": 64} | sizes
    arrays, others = arrays_of(Case(op, "unsupported", dims, "bfloat16"))
    with interpreted():
        explanation = pallas_ssm.explain(op, **arrays, **others)
        assert explanation.implementation == "xla" and explanation.reason.endswith(reason)
        with pytest.raises(NotImplementedError, match=f"^{op}: the mosaic_gpu kernel {reason}"):
            OPERATORS[op].function(pallas_ssm, others)(**arrays, **others, implementation="mosaic_gpu")
