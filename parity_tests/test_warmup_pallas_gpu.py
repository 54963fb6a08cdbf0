"""On a GPU: operators that other processes compiled, or an earlier one, run as those that `jax.jit` compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

_IN_A_PROCESS = """
import sys
import jax
import numpy as np
import pallas_ssm
from pallas_ssm import _warmup_programs
from ssm_configs.models import warming

dims = pallas_ssm.ModelDims(heads=16, groups=1, headdim=64, dstate=128, chunk_size=128)
summary = pallas_ssm.warmup(dims, max_tokens=96, max_batch=24, cache_dir=sys.argv[1], progress=False)
print(summary.variants, summary.cache_hits, summary.calls, flush=True)
request = _warmup_programs.Request(
    dims, 96, 24, warming.operators(dims), ("packed", "dense"), ("split",), (1,), 25, 0, None
)
rng = np.random.default_rng(0)

def draw(name, shape):
    if name == "cu_seqlens":
        return np.array([0, 13], np.int32)
    if shape.dtype.kind == "i":
        return np.arange(shape.size, dtype=shape.dtype).reshape(shape.shape)
    values = rng.standard_normal(shape.shape)
    return (-np.abs(values) if name == "A" else values).astype(shape.dtype)

for name, function, shapes in _warmup_programs.make_programs(request):
    arrays = {key: draw(key, shape) for key, shape in shapes.items()}
    with pallas_ssm.forbid_compiles():
        got = jax.block_until_ready(function(**arrays))
    operator, options = getattr(pallas_ssm, function.op, None), dict(function.options)
    if operator is None:
        from pallas_ssm.causal_conv1d import causal_conv1d_split as operator
    expected = jax.jit(lambda arrays: operator(**arrays, **options))(arrays)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=name)
"""


def test_stored_programs_do_what_jitted_ones_do(tmp_path: Path):
    command = [sys.executable, "-c", _IN_A_PROCESS, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path), "PYTHONWARNINGS": "ignore"}
    for hits in (False, True):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
        assert done.returncode == 0, done.stderr
        assert "compiled in this process" not in done.stderr  # the processes did it
        variants, found, calls = map(int, done.stdout.split())
        assert variants == calls > 10 and found == hits * calls
