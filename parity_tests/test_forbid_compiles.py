"""`forbid_compiles`: what was compiled before runs, what was not is refused by name, and afterwards all is as it was."""

import jax
import jax.numpy as jnp
import pytest

import pallas_ssm
from ssm_configs.late_compile import LateCompileError


@jax.jit
def doubled(x):
    return 2 * x


def test_jax_runs_what_it_has_compiled_and_refuses_the_rest():
    three, four = jnp.ones(3), jnp.ones(4)
    doubled(three)
    with pallas_ssm.forbid_compiles():
        assert doubled(three).tolist() == [2, 2, 2]
        with pytest.raises(LateCompileError, match=r"doubled: .*(?s:.)*f32\[4\] and before f32\[3\]"):
            doubled(four)
    assert doubled(four).tolist() == [2] * 4


def test_jax_refuses_a_new_shape_outside_of_jit():
    with pallas_ssm.forbid_compiles(), pytest.raises(LateCompileError):
        jnp.zeros((1, 2, 3, 4, 5, 6, 7))


def test_jax_contexts_nest():
    x = jnp.ones(5)
    with pallas_ssm.forbid_compiles():
        with pallas_ssm.forbid_compiles():
            pass
        with pytest.raises(LateCompileError):
            doubled(x)
    assert doubled(x).shape == (5,)


def test_the_log_stays_quiet(caplog):
    x = jnp.ones(6)
    with pallas_ssm.forbid_compiles(), pytest.raises(LateCompileError):
        doubled(x)
    assert "CACHE MISS" not in caplog.text
