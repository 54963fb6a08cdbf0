"""Warm-up on a GPU: a thousand steps of a server without a compile, in little memory, and quicker the second time."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssm_configs.model_dims import ModelDims
from ssm_configs.models import warming

from .serving import TorchServer, Traffic
from .serving_jax import JaxServer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning"),
]

NEMOTRON_H = ModelDims(heads=128, groups=8, headdim=64, dstate=128, chunk_size=128, model="Nemotron-H-8B")
# One of eight devices: tokens that are not whole multiples of 16 bytes apart, and a scan in many pieces.
MAMBA2 = ModelDims(heads=80, groups=1, headdim=64, dstate=128, chunk_size=256, model="Mamba2-2.7B").slice(8)
FALCON_H1 = ModelDims(heads=24, groups=1, headdim=64, dstate=256, chunk_size=128, model="Falcon-H1", gate=True)
QWEN3_NEXT = ModelDims(
    key_heads=16, value_heads=32, key_dim=128, value_dim=128, conv_bias=False, model="Qwen3-Next"
).slice(2)
SIZES: dict[str, Any] = {"max_tokens": 8192, "max_batch": 256}


def traffic(seed: int, **changes: Any) -> Traffic:
    return Traffic(seed, **({"max_prompt": 8192, "max_prefills": 16} | SIZES | changes))


@pytest.mark.parametrize("dims", (NEMOTRON_H, MAMBA2, FALCON_H1, QWEN3_NEXT), ids=lambda dims: dims.model)
def test_a_thousand_steps_compile_nothing(dims):
    import torch

    import triton_ssm

    warming.forget()
    summary = triton_ssm.warmup(dims, speculative=3, progress=False, **SIZES)
    print(summary)
    assert summary.variants and summary.peak_bytes is not None
    assert summary.peak_bytes < 2 << 30
    requests = traffic(0, speculative=3)
    server = TorchServer(dims, requests, "cuda")
    kinds = set()
    with triton_ssm.forbid_compiles():
        for step in requests.steps(1000):
            server.run(step)
            kinds.add(step.kind)
    torch.cuda.synchronize()
    assert kinds == {"prefill", "decode", "speculative", "training"}


@pytest.mark.parametrize("how", ({"entry": "plain"}, {"entry": "aligned"}, {"sliced": True}), ids=str)
def test_other_ways_to_call(how):
    import torch

    import triton_ssm

    warming.forget()
    entries = [how.get("entry", "split")]
    print(triton_ssm.warmup(MAMBA2, entries=entries, sliced="sliced" in how, speculative=1, progress=False, **SIZES))
    requests = traffic(1, speculative=1)
    server = TorchServer(MAMBA2, requests, "cuda", **how)
    with triton_ssm.forbid_compiles():
        for step in requests.steps(200):
            server.run(step)
    torch.cuda.synchronize()


def test_without_warmup_the_first_request_compiles():
    from ssm_configs.late_compile import LateCompileError
    from triton_ssm import forbid_compiles

    # Sizes that no other test of this module has.
    dims = ModelDims(heads=12, groups=3, headdim=64, dstate=64, chunk_size=64)
    requests = traffic(2)
    server = TorchServer(dims, requests, "cuda")
    with forbid_compiles(), pytest.raises(LateCompileError):
        for step in requests.steps(5):
            server.run(step)


_IN_A_PROCESS = """
import sys
import triton_ssm
dims = triton_ssm.ModelDims(heads=10, groups=1, headdim=64, dstate=128, chunk_size=256)
print(triton_ssm.warmup(dims, max_tokens=8192, max_batch=256, progress=False, cache_dir=sys.argv[1]))
"""


def test_a_cache_directory_serves_the_next_process(tmp_path: Path):
    command = [sys.executable, "-c", _IN_A_PROCESS, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path), "PYTHONWARNINGS": "ignore"}
    found = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
        print(done.stdout)
        match = re.search(r"(\d+) variants by \d+ calls in ([\d.]+) s, (\d+) from", done.stdout)
        assert match, done.stdout
        found.append((int(match[1]), float(match[2]), int(match[3])))
    (cold, cold_seconds, none), (warm, warm_seconds, hits) = found
    assert cold == warm == hits and none < cold
    assert warm_seconds < cold_seconds


def test_jax_serving_compiles_nothing():
    import pallas_ssm

    warming.forget()
    requests = traffic(3, max_tokens=1024, max_batch=64, max_prompt=4096, max_prefills=4, speculative=1)
    server = JaxServer(MAMBA2, requests)
    print(
        pallas_ssm.warmup(
            MAMBA2, ops=(), max_tokens=1024, max_batch=64, programs=server.programs(), progress=False
        )
    )  # fmt: skip
    with pallas_ssm.forbid_compiles():
        for step in requests.steps(1000):
            server.run(step)
