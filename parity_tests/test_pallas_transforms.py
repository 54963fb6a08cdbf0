"""Operators of `pallas_ssm` under JAX's transformations and modes, beside what the operators' own tests have of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_ssm
from pallas_ssm import layouts
from pallas_ssm._activations_xla import sigmoid, silu
from pallas_ssm.ssd import _xla_stages

from .interpret_mosaic import interpreted

pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def ints(*values):
    return jnp.array(values, jnp.int32)


def decode() -> dict[str, Any]:
    state, x, dt, A = drawn(4, 1, 2, 4), drawn(4, 1, 2), drawn(4, 1), -jnp.ones(1)
    arrays: dict[str, Any] = {"state": state, "x": x, "dt": dt, "A": A, "B": drawn(4, 1, 4), "C": drawn(4, 1, 4)}
    return arrays | {"state_batch_indices": ints(2, 0, -1), "cu_seqlens": ints(0, 1, 2, 3)}


def delta_rule() -> dict[str, Any]:
    arrays: dict[str, Any] = {
        "q": drawn(1, 40, 1, 4),
        "k": drawn(1, 40, 1, 4),
        "v": drawn(1, 40, 1, 2),
        "g": -jnp.ones((1, 40, 1)),
    }
    return arrays | {"beta": jnp.ones((1, 40, 1)), "cu_seqlens": ints(0, 3, 3, 39)}


def scan() -> dict[str, Any]:
    arrays: dict[str, Any] = {
        "x": drawn(1, 300, 1, 2),
        "dt": drawn(1, 300, 1),
        "A": -jnp.ones(1),
        "B": drawn(1, 300, 1, 2),
    }
    return arrays | {"C": drawn(1, 300, 1, 2), "initial_states": drawn(2, 1, 2, 2), "cu_seqlens": ints(0, 3, 300)}


LOOPS = {
    "selective_state_update": (decode, {}),
    "chunk_gated_delta_rule": (delta_rule, {"chunk_size": 16, "return_final_state": True}),
    "mamba_chunk_scan_combined": (scan, {"chunk_size": 128, "return_final_states": True}),
}


def in_shard_map(function, out, **options):
    """`function(own, shared)`, with its first argument different on every device."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        lambda own, shared: function(own[0], shared), mesh=mesh, in_specs=(P("i"), P()), out_specs=out, **options
    )


@pytest.mark.parametrize("op", LOOPS)
def test_loops_inside_shard_map(op, monkeypatch):
    """A carry that begins as the same on all devices ends as different, whichever argument is different."""
    monkeypatch.setattr(_xla_stages, "chunks_at_once", lambda *_: 1)
    make, options = LOOPS[op]
    arrays = make()
    for name in arrays:
        shared = {other: array for other, array in arrays.items() if other != name}

        def call(own, shared, name=name):
            results = getattr(pallas_ssm, op)(**{name: own}, **shared, **options)
            return [result[None] for result in results]

        y, state = jax.eval_shape(in_shard_map(call, P("i")), arrays[name][None], shared)
        assert y.shape[1:] == arrays["v" if "v" in arrays else "x"].shape and state.shape[0] == 1


def test_gradients_inside_shard_map():
    arrays = decode()
    indices = {name: arrays.pop(name) for name in ("state_batch_indices", "cu_seqlens")}

    def gradient(x, shared):
        def loss(shared):
            y, state = pallas_ssm.selective_state_update(x=x, **shared, **indices, implementation="xla")
            return y.sum() + state.sum()

        return jax.grad(loss)(shared)

    x = arrays.pop("x")
    got, expected = jax.jit(in_shard_map(gradient, P()))(x[None], arrays), jax.jit(gradient)(x, arrays)
    for name in arrays:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)


def test_kernels_in_a_shard_map_that_checks():
    """Pallas takes no references to what varies: None means XLA there, and the kernel says what it needs."""
    x, state, weight = drawn(2, 128), drawn(2, 3, 128), drawn(128, 4)

    def call(x, shared, implementation=None):
        return pallas_ssm.causal_conv1d_update(x, *shared, implementation=implementation)[0]

    def asked(x, shared):
        return call(x, shared, "mosaic_gpu")

    with interpreted():
        got = jax.jit(in_shard_map(call, P("i")))(x[None], (state, weight))
        with pytest.raises(NotImplementedError, match=r"causal_conv1d_update: .*jax\.shard_map with check_vma=True"):
            in_shard_map(asked, P("i"))(x[None], (state, weight))
        jax.eval_shape(in_shard_map(asked, P("i"), check_vma=False), x[None], (state, weight))
    np.testing.assert_allclose(got, call(x, (state, weight), "xla"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "function, slope",
    [(sigmoid, lambda v, s, rest: s * rest), (silu, lambda v, s, rest: s * (1 + v * rest))],
    ids=["sigmoid", "silu"],
)
def test_slopes_where_an_exponential_overflows(function, slope):
    v = np.array([-3e38, -200, -89, -20, 0, 20, 200, 3e38], np.float32)
    wide = v.astype(np.float64)
    s, rest = (1 / (1 + np.exp(np.clip(sign * wide, -700, 700))) for sign in (-1, 1))
    first, second = jax.grad(function), jax.grad(jax.grad(function))
    np.testing.assert_allclose(jax.vmap(first)(v), slope(wide, s, rest), rtol=1e-5, atol=1e-30)
    assert np.isfinite(jax.vmap(second)(v[1:-1])).all()


@pytest.mark.parametrize("op", ["causal_conv1d", "mamba_chunk_scan_combined", "selective_state_update", "recurrent"])
def test_gradients_at_closed_gates(op):
    """A gate of -100 lets nothing through, and leaves no NaN in anything's gradient."""
    closed = jnp.full((1, 3, 1, 2), -100.0)

    def loss(own):
        if op == "causal_conv1d":
            return pallas_ssm.causal_conv1d(own[..., 0, :], jnp.ones((2, 2)), activation="silu")[0].sum()
        if op == "mamba_chunk_scan_combined":
            x, dt, B = jnp.ones((1, 3, 1, 2)), jnp.ones((1, 3, 1)), jnp.ones((1, 3, 1, 2))
            return pallas_ssm.mamba_chunk_scan_combined(x, dt, -jnp.ones(1), B, B, chunk_size=16, z=own)[0].sum()
        if op == "selective_state_update":
            state, x, dt, B = jnp.ones((3, 1, 2, 2)), jnp.ones((3, 1, 2)), jnp.ones((3, 1)), jnp.ones((3, 1, 2))
            return pallas_ssm.selective_state_update(state, x, dt, -jnp.ones(1), B, B, z=own[0])[0].sum()
        q, state, beta = jnp.ones((3, 1, 2)), jnp.ones((3, 1, 2, 2)), own[0, ..., 0]
        update = pallas_ssm.fused_recurrent_gated_delta_rule
        return update(q, q, q, -jnp.ones((3, 1)), beta, state, sigmoid_beta=True)[0].sum()

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(closed), 0.0, atol=1e-30)


def test_padding_is_no_nan_on_the_way():
    """`jax.debug_nans` looks at every operation outside of jax.jit."""
    x, weight, state = drawn(2, 4), drawn(4, 3), drawn(3, 2, 4)
    with jax.debug_nans(True):
        y, _ = pallas_ssm.causal_conv1d_update(x, state, weight, conv_state_indices=ints(1, -1))
        packed, _ = pallas_ssm.selective_state_update(**decode())
    assert not y[1].any() and not packed[2:].any()


def test_wide_indices_of_numpy_keep_their_sign():
    """JAX cuts them to 32 bits when it takes them, by which padding would name a slot."""
    arrays: dict[str, Any] = decode() | {"state_batch_indices": np.array([2, 0, 1 - 2**32])}
    y, state = pallas_ssm.selective_state_update(**arrays)
    expected = pallas_ssm.selective_state_update(**decode())
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_array_equal(state, expected[1])


def test_a_dtype_of_jax_alone_is_named():
    arrays: dict[str, Any] = decode() | {"x": jax.random.split(jax.random.key(0), (4, 1, 2))}
    with pytest.raises(TypeError, match="x: expected dtype float32 or bfloat16 or float16, got key<fry>"):
        pallas_ssm.selective_state_update(**arrays)


@pytest.mark.parametrize("op", ["selective_state_update", "causal_conv1d", "causal_conv1d_update"])
def test_explain_takes_what_the_operator_takes(op):
    with pytest.raises(TypeError, match="unexpected keyword argument 'conv_stat'"):
        pallas_ssm.explain(
            op, *[drawn(1)] * 6 if op[0] == "s" else [drawn(1)] * (2 + op.endswith("e")), conv_stat=ints(1)
        )
    with pytest.raises(TypeError, match="missing a required argument: '"):
        pallas_ssm.explain(op, drawn(1))


@pytest.mark.parametrize("bounds", [np.array([0, 3, 9]), np.array([0, 3, 9], np.int32)], ids=["int64", "int32"])
def test_aligned_rows_by_numpys_bounds(bounds):
    """Under jax.jit, in 64-bit mode and without implicit promotion."""
    x = drawn(1, 12, 2)
    there = jax.jit(lambda x: layouts.to_chunk_aligned(x, chunk_size=4, cu_seqlens=bounds))
    back = jax.jit(lambda x: layouts.from_chunk_aligned(x, chunk_size=4, tokens=12, cu_seqlens=bounds))
    expected = jnp.where(jnp.arange(12)[:, None] < 9, x, 0)
    np.testing.assert_array_equal(back(there(x)), expected)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(back(there(x)), expected)
