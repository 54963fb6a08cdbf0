"""The fused Mosaic GPU path of `chunk_gated_delta_rule`: interpreted, with race detection, against the oracle."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_ssm
from pallas_ssm.gdn import _fused, _fused_inverse
from pallas_ssm.gdn._dispatch import prepare
from pallas_ssm.ssd._tiles import LAYOUT, load
from ssm_configs import Device

from .interpret_mosaic import interpreted
from .oracle import gdn as oracle
from .test_pallas_gdn import COMBINED, draw, relative

H200 = Device("NVIDIA H200", (9, 0))
SIZES = {"H_k": 1, "H_v": 2, "K": 64, "V": 64}


def problem(
    T: int, cu_seqlens: list[int] | None = None, *, B: int = 1, dtype: str = "bfloat16", seed: int = 0, initial: bool = True,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    sizes = SIZES | {name: more.pop(name) for name in SIZES if name in more}
    arguments = draw(B, T, **sizes, dtype=dtype, seed=seed)
    N_seq = B if cu_seqlens is None else len(cu_seqlens) - 1
    if initial:
        states = np.random.default_rng(seed).standard_normal((N_seq, sizes["H_v"], sizes["K"], sizes["V"]))
        arguments["initial_state"] = states.astype(np.float32)
    if cu_seqlens is not None:
        arguments["cu_seqlens"] = np.array(cu_seqlens, np.int32)
    return arguments | more


def by_kernel(*arguments: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each of these, which differ in arrays alone. Under one jit; a fresh one, because what was traced outside the
    interpreter would not be interpreted."""
    static = {name: value for name, value in arguments[0].items() if not isinstance(value, np.ndarray)}

    @jax.jit
    def run(dynamic: dict[str, Any]) -> Any:
        options: dict[str, Any] = {"return_final_state": True, "implementation": "mosaic_gpu"} | static
        return pallas_ssm.chunk_gated_delta_rule(**dynamic, **options)

    results = []
    with interpreted():
        for one in arguments:
            o, final = jax.block_until_ready(run({name: one[name] for name in one if name not in static}))
            results.append((np.asarray(o), np.asarray(final)))
    return results


def expected(arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    wide: dict[str, Any] = {name: np.asarray(arguments[name], np.float64) for name in ("q", "k", "v")}
    return oracle.chunk_gated_delta_rule(**(arguments | wide))


def check(arguments: dict[str, Any]) -> None:
    dtype = "float16" if arguments["q"].dtype == np.float16 else "bfloat16"
    ((o, final),) = by_kernel(arguments)
    o_expected, final_expected = expected(arguments)
    assert o.dtype == arguments["v"].dtype and final.dtype == np.float32
    assert relative(o, o_expected) <= COMBINED[dtype]
    assert relative(final, final_expected) <= COMBINED[dtype]
    assert not o[o_expected == 0].any(), "a row without a token is not zero"


CASES: dict[str, dict[str, Any]] = {
    "more chunks than fit, the last begun": {"T": 300, "use_qk_l2norm": True},
    "a model's heads, two rows": {"T": 70, "B": 2, "K": 128, "V": 128, "use_qk_l2norm": True, "initial": False},
    "six value heads of two keys": {"T": 64, "H_k": 2, "H_v": 6, "dtype": "float16", "scale": 0.3},
    "packed, one head": {"T": 230, "cu_seqlens": [0, 5, 5, 75, 205], "H_v": 1, "use_qk_l2norm": True},
    "packed, all padding": {"T": 70, "cu_seqlens": [0, 0, 0]},
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name: str):
    check(problem(**CASES[name]))


@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_drawn(data: st.DataObject):
    sizes = {name: data.draw(st.sampled_from([64, 128])) for name in ("K", "V")}
    H_k = data.draw(st.integers(1, 2))
    lengths = data.draw(st.lists(st.integers(0, 130), min_size=1, max_size=3))
    T = max(1, sum(lengths) + data.draw(st.integers(0, 70)))
    options = {"use_qk_l2norm": data.draw(st.booleans()), "initial": data.draw(st.booleans())}
    heads = {"H_k": H_k, "H_v": H_k * data.draw(st.integers(1, 2))}
    dtype = data.draw(st.sampled_from(["bfloat16", "float16"]))
    check(problem(T, [0, *np.cumsum(lengths).tolist()], dtype=dtype, **sizes, **heads, **options))


def test_what_other_sequences_hold_does_not_matter():
    """NaN there included: in every operand, right before and behind. And a sequence has its bits wherever it is packed."""
    bounds = [0, 20, 110, 140]
    arguments = problem(150, bounds, use_qk_l2norm=True)
    own = (np.arange(150) >= 20) & (np.arange(150) < 110)
    spoilt = dict(arguments)
    for name in ("q", "k", "v", "g", "beta"):
        array = arguments[name]
        spoilt[name] = np.where(own.reshape(1, -1, *[1] * (array.ndim - 2)), array, np.nan).astype(array.dtype)
    spoilt["initial_state"] = arguments["initial_state"].copy()
    spoilt["initial_state"][0], spoilt["initial_state"][2] = np.nan, np.inf
    (clean, states), (o, final) = by_kernel(arguments, spoilt)
    assert o[:, own].tobytes() == clean[:, own].tobytes() and final[1].tobytes() == states[1].tobytes()

    alone = {name: arguments[name][:, own] for name in ("q", "k", "v", "g", "beta")}
    alone |= {"initial_state": arguments["initial_state"][1:2], "cu_seqlens": np.array([0, 90], np.int32)}
    ((o, final),) = by_kernel(arguments | alone)
    assert o.tobytes() == clean[:, own].tobytes() and final[0].tobytes() == states[1].tobytes()


def test_a_state_goes_on_where_it_stopped():
    arguments = problem(128, use_qk_l2norm=True)
    ((o, final),) = by_kernel(arguments)
    halves, state = [], arguments["initial_state"]
    for part in (slice(0, 64), slice(64, 128)):
        now = {name: arguments[name][:, part] for name in ("q", "k", "v", "g", "beta")}
        ((o_part, state),) = by_kernel(arguments | now | {"initial_state": state})
        halves.append(o_part)
    assert np.concatenate(halves, axis=1).tobytes() == o.tobytes() and state.tobytes() == final.tobytes()


SEGMENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "the last begun, and alone": (2, {"T": 300, "use_qk_l2norm": True}),
    "rows of two": (1, {"T": 128, "B": 2, "K": 128, "initial": False}),
    "packed": (2, {"T": 460, "cu_seqlens": [0, 5, 5, 440], "H_v": 1}),
    "packed, where the next one's begin": (1, {"T": 320, "cu_seqlens": [0, 64, 192, 320], "H_v": 1, "initial": False}),
}


@pytest.mark.parametrize(("chunks", "arguments"), SEGMENTS.values(), ids=SEGMENTS)
def test_segments(monkeypatch: pytest.MonkeyPatch, chunks: int, arguments: dict[str, Any]):
    """Of `chunks` chunks."""
    monkeypatch.setattr(_fused, "segment_of", lambda _: chunks)
    check(problem(**arguments))


def test_bounds_are_only_data():
    """Wherever they lie nothing outside the tokens is touched (the interpreter would see it), nor is a token left unwritten."""
    arguments = problem(130, [0, 60, 100, 130], initial=False, H_v=1)
    wild = ([0, 70, 500, 600], [-7, 60, 60, 100])
    for o, final in by_kernel(*(arguments | {"cu_seqlens": np.array(bounds, np.int32)} for bounds in wild)):
        assert np.isfinite(o.astype(np.float32)).all() and np.isfinite(final).all()


def inverse(A: np.ndarray) -> np.ndarray:
    """Of I + A[0] and I + A[1], by the kernel's own steps, and not rounded after."""

    def body(A: Any, out: Any, blocks: Any, terms: Any) -> None:
        triangles = [load(A.at[r], layout=LAYOUT) for r in range(2)]
        below = [_fused_inverse.put(blocks, r, triangle) for r, triangle in enumerate(triangles)]
        plgpu.commit_smem()
        _fused_inverse.substitute(blocks)
        plgpu.commit_smem()
        for r in range(2):
            out.at[r][...] = _fused_inverse.merge(_fused_inverse.get(blocks, r), below[r], terms)

    kernel = plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct(A.shape, jnp.float32),
        scratch_types=[_fused_inverse.blocks_scratch(), _fused_inverse.terms_scratch()],
        grid=(1,), grid_names=("block",), compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )  # fmt: skip
    with interpreted():
        return np.asarray(jax.block_until_ready(jax.jit(kernel)(A)))


def test_the_inverse_is_far_better_than_what_it_is_rounded_to():
    """Of triangles whose powers grow beyond all bounds, too: the largest error, of the largest element."""
    rng = np.random.default_rng(0)
    alike = rng.standard_normal(128) + 0.1 * rng.standard_normal((64, 128))
    alike /= np.linalg.norm(alike, axis=1, keepdims=True)
    triangles = [np.ones((64, 64)), rng.uniform(-1, 1, (64, 64)), alike @ alike.T * 0.99, np.full((64, 64), -0.25)]
    for pair in (triangles[:2], triangles[2:]):
        A = np.tril(np.stack(pair), -1).astype(np.float32)
        exact = np.linalg.inv(np.eye(64) + A.astype(np.float64))
        error = np.abs(inverse(A) - exact).max((1, 2)) / np.abs(exact).max((1, 2))
        assert (error <= 2e-5).all(), error  # measured: 4.4e-6


REFUSED = [
    ({"K": 32}, "needs K in multiples of 64 up to 128, got 32"),
    ({"K": 192}, "needs K in multiples of 64 up to 128, got 192"),
    ({"V": 320}, "needs V in multiples of 64 up to 256, got 320"),
    ({"dtype": "float32"}, "takes 16-bit inputs, got float32"),
    ({"chunk_size": 32}, "needs chunk_size=64, got 32"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[str(change) for change, _ in REFUSED])
def test_what_the_kernel_does_not_take(change: dict[str, Any], reason: str):
    arguments = problem(40, **change)
    with (
        interpreted(),
        pytest.raises(NotImplementedError, match=f"chunk_gated_delta_rule: the mosaic_gpu kernel {reason}"),
    ):
        pallas_ssm.chunk_gated_delta_rule(**arguments, implementation="mosaic_gpu")


def test_a_launch_is_a_static_argument():
    for H_v, heads in ((2, 1), (4, 2), (6, 1), (8, 2)):
        prepared = prepare("chunk_gated_delta_rule", **problem(40, H_k=2, H_v=H_v, initial=False))
        launch = _fused.plan(prepared.static, prepared.arrays, H200)
        assert launch.HEADS == heads and hash(launch) == hash(_fused.Launch(heads, launch.num_stages, launch.segment))


def test_gradients_are_those_of_the_xla_form():
    arguments = problem(40, use_qk_l2norm=True)
    floats = {name: arguments.pop(name) for name in ("q", "k", "v", "g", "beta", "initial_state")}

    def loss(implementation: Any, floats: dict[str, Any]):
        o, _ = pallas_ssm.chunk_gated_delta_rule(**floats, **arguments, implementation=implementation)
        return (o.astype(jnp.float32)).sum()

    with interpreted():
        got = jax.block_until_ready(jax.jit(jax.grad(lambda floats: loss("mosaic_gpu", floats)))(floats))
    by_xla = jax.jit(jax.grad(lambda floats: loss("xla", floats)))(floats)
    assert all(np.array_equal(got[name], by_xla[name]) and np.any(got[name]) for name in floats)
