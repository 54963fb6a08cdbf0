"""`pallas_ssm.warmup`: after it, a server's own steps and the operators' jitted forms compile nothing."""

import inspect
import logging
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_ssm
import ssm_configs
from pallas_ssm import _warmup_jitted, _warmup_programs
from ssm_configs.late_compile import LateCompileError
from ssm_configs.model_dims import ModelDims
from ssm_configs.models import warming

from .configs_env import forget_everything
from .serving import Traffic
from .serving_jax import JaxServer

DIMS = ModelDims(heads=2, groups=1, headdim=16, dstate=16, chunk_size=16, model="tiny")
GDN = ModelDims(key_heads=1, value_heads=2, key_dim=16, value_dim=16, conv_bias=False)
SIZES: dict[str, Any] = {"max_tokens": 24, "max_batch": 20}


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_everything(monkeypatch)
    warming.forget()
    _warmup_jitted._jitted.cache_clear()


def test_serving_compiles_nothing():
    sizes: dict[str, Any] = SIZES | {"max_tokens": 70}
    traffic = Traffic(0, max_prompt=100, max_prefills=2, speculative=2, **sizes)
    server = JaxServer(DIMS, traffic)
    summary = pallas_ssm.warmup(DIMS, ops=(), programs=server.programs(), **sizes)
    # Prefill and training at 64 and 96 tokens, decode and speculative decode of 16 and 24 sequences.
    assert summary.variants == summary.calls == 8
    kinds = set()
    with pallas_ssm.forbid_compiles():
        for step in traffic.steps(60):
            server.run(step)
            kinds.add(step.kind)
    assert kinds == {"prefill", "decode", "speculative", "training"}


def test_a_program_outlives_the_traces_of_those_after_it():
    """JAX keeps 2,048 traces, and a program with kernels takes dozens."""

    steps = [jax.jit(lambda x, n=n: x + n) for n in range(2100)]

    def nested(x):
        for step in steps:
            x = step(x)
        return x

    first, then, x = jax.jit(lambda x: x + 1), jax.jit(nested), np.zeros(3, np.float32)
    pallas_ssm.warmup(None, programs=[(first, (x,)), (then, (x,))], **SIZES)
    with pallas_ssm.forbid_compiles():
        first(x)


def test_serving_without_warmup_is_refused():
    traffic = Traffic(0, max_prompt=40, max_prefills=2, **SIZES)
    server = JaxServer(DIMS, traffic)
    pallas_ssm.warmup(DIMS, ops=(), programs=[next(server.programs())], **SIZES)
    with pallas_ssm.forbid_compiles(), pytest.raises(LateCompileError):
        for step in traffic.steps(40):
            server.run(step)


@pytest.mark.parametrize("dims", (DIMS, GDN), ids=("mamba", "gdn"))
def test_the_operators_are_found_by_their_jitted_forms(dims):
    summary = pallas_ssm.warmup(dims, max_tokens=16, max_batch=16, sequences=(2,), forms=("packed",), speculative=1)
    assert summary.variants == summary.calls == {DIMS: 7, GDN: 7}[dims]
    request = _warmup_programs.Request(
        dims, 16, 16, warming.operators(dims), ("packed",), ("split",), (2,), 17, 1, None
    )  # fmt: skip
    for _, function, shapes in _warmup_programs.make_programs(request):
        arrays = {key: np.ones(shape.shape, shape.dtype) for key, shape in shapes.items() if shape is not None}
        with pallas_ssm.forbid_compiles():
            jax.block_until_ready(function(**arrays))


def test_jitted_is_one_function_for_equal_options():
    jitted = pallas_ssm.jitted("causal_conv1d", activation="silu", null_slot=0)
    assert jitted is pallas_ssm.jitted("causal_conv1d", null_slot=0, activation="silu")
    assert jitted is not pallas_ssm.jitted("causal_conv1d", activation="silu")
    x, weight = jnp.ones((1, 5, 8)), jnp.ones((8, 4))
    plain = pallas_ssm.jitted("causal_conv1d", activation="silu")(x=x, weight=weight)[0]
    assert jnp.array_equal(plain, jax.jit(lambda: pallas_ssm.causal_conv1d(x, weight, activation="silu"))()[0])
    with pytest.raises(ValueError, match=r"op: expected one of .*, got 'scan'"):
        pallas_ssm.jitted("scan")
    with pytest.raises(TypeError, match="sizes: expected a hashable option, got list"):
        pallas_ssm.jitted("causal_conv1d_split", sizes=[4, 4])


def test_every_form_and_entry_lowers():
    entries, forms = warming.ENTRIES, warming.FORMS
    for dims in (ModelDims(heads=2, groups=1, headdim=16, dstate=16, chunk_size=16, gate=True), GDN):
        request = _warmup_programs.Request(dims, 70, 3, warming.operators(dims), forms, entries, (1, 3), 5, 1, "xla")
        names = set()
        for name, function, shapes in _warmup_programs.make_programs(request):
            function.eval_shape(**shapes)
            names.add(name)
        assert len(names) > 50


def test_buckets():
    assert pallas_ssm.buckets(1) == [16]
    assert pallas_ssm.buckets(100) == [16, 24, 32, 48, 64, 96, 128]
    assert pallas_ssm.buckets(100, 64) == [64, 96, 128]
    for size in range(1, 300):
        assert pallas_ssm.bucket(size) in pallas_ssm.buckets(300)
    with pytest.raises(ValueError, match="most: expected at least 1, got 0"):
        pallas_ssm.buckets(0)
    with pytest.raises(TypeError, match="most: expected an int, got float"):
        pallas_ssm.buckets(33.5)  # pyright: ignore[reportArgumentType]


def test_once_per_process_and_config():
    named: dict[str, Any] = {"ops": ["causal_conv1d_update"], "max_tokens": 16, "max_batch": 3}
    first, second = (pallas_ssm.warmup(DIMS, **named) for _ in range(2))
    assert first.calls == second.calls == 1 and second.cached and not first.cached
    with ssm_configs.override("causal_conv1d_update", BLOCK_SIZE_D=64):
        third = pallas_ssm.warmup(DIMS, **named)
    assert not third.cached and third.variants == 1
    with ssm_configs.override("causal_conv1d_update", BLOCK_SIZE_D=64), pallas_ssm.forbid_compiles():
        # What was compiled under an override is found under it, though another thread compiled it.
        function = pallas_ssm.jitted("causal_conv1d_update", activation="silu", implementation=None)
        shapes = {"x": (16, 64), "conv_state": (4, 3, 64), "weight": (64, 4), "bias": (64,)}
        arrays = {name: np.ones(shape, jnp.bfloat16) for name, shape in shapes.items()}
        function(**arrays, conv_state_indices=np.full(16, -1, np.int32))


def test_without_a_config_nothing_is_warmed_and_that_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert pallas_ssm.warmup(None, **SIZES).calls == 0
    assert len(caplog.records) == 1 and "pallas_ssm.warmup: no model config" in caplog.text


_IN_A_PROCESS = """
import sys
import pallas_ssm
dims = pallas_ssm.ModelDims(heads=2, groups=1, headdim=16, dstate=16, chunk_size=16)
import jax.numpy as jnp
jnp.ones(3) + 1  # JAX has asked for a cache by now, and found none
named = {"ops": ["selective_state_update"], "max_tokens": 16, "max_batch": 16, "progress": False}
summary = pallas_ssm.warmup(dims, cache_dir=sys.argv[1], **named)
print(summary.variants, summary.cache_hits)

import numpy as np
shapes = {"state": (17, 2, 16, 16), "x": (16, 2, 16), "dt": (16, 2), "A": (2,), "B": (16, 1, 16), "C": (16, 1, 16), "D": (2,)}
float32 = ("A", "state")
draw = np.random.default_rng(0).standard_normal
arrays = {name: draw(shape).astype("float32" if name in float32 else jnp.bfloat16) for name, shape in shapes.items()}
arrays |= {"dt_bias": arrays["D"], "state_batch_indices": np.arange(16, dtype=np.int32)}
with pallas_ssm.forbid_compiles():
    y, state = pallas_ssm.jitted("selective_state_update", dt_softplus=True, implementation=None)(**arrays)
print(np.asarray(y).tobytes().hex(), np.asarray(state).tobytes().hex())
"""


def test_a_cache_directory_serves_the_next_process(tmp_path):
    command = [sys.executable, "-c", _IN_A_PROCESS, str(tmp_path)]
    results = []
    for expected in ("1 0", "1 1"):
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}
        )
        said, *result = done.stdout.splitlines()
        assert said == expected, done.stderr
        assert result, done.stderr  # the call compiled nothing
        results.append(result)
    assert results[0] == results[1]
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    (
        ({"max_tokens": 0}, ValueError, "max_tokens: expected at least 1, got 0"),
        ({"sequences": (0,)}, ValueError, "sequences: expected at least 1, got 0"),
        ({"sequences": 4}, TypeError, "sequences: expected a sequence of ints, got int"),
        ({"threads": True}, TypeError, "threads: expected an int or None, got bool"),
        ({"processes": 0}, ValueError, "processes: expected at least 1, got 0"),
        ({"slots": 2.0}, TypeError, "slots: expected an int, got float"),
        ({"ops": ["gdn"]}, ValueError, "ops: expected some of .*, got 'gdn'"),
        ({"forms": ["ragged"]}, ValueError, "forms: expected some of .*, got 'ragged'"),
        ({"implementation": "triton"}, ValueError, "implementation: expected one of .* or None, got 'triton'"),
        ({"programs": [jax.jit(jnp.sin)]}, TypeError, r"programs\[0\]: expected \(jitted function, tuple of arguments\)"),
        ({"programs": [(jnp.shape, ())]}, TypeError, r"programs\[0\]: expected a function from jax.jit"),
    ),
)  # fmt: skip
def test_errors(change, error, text):
    with pytest.raises(error, match=text):
        pallas_ssm.warmup(DIMS, **(SIZES | change))


def test_a_failing_program_is_named():
    broken = jax.jit(lambda x: x @ x)
    with pytest.raises(RuntimeError, match=r"warmup: programs\[1\]: .*\(1 of 2 calls failed\)"):
        fine = (broken, (jnp.ones((2, 2)),))
        pallas_ssm.warmup(None, programs=[fine, (broken, (jnp.ones((2, 3)),))], **SIZES)


def test_every_argument_is_documented():
    documented = pallas_ssm.warmup.__doc__ or ""
    assert all(f"{name}:" in documented for name in inspect.signature(pallas_ssm.warmup).parameters)
