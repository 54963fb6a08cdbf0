"""`python -m benchmarks start warmup`: a whole model's warm-up as one more first call."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import start_command, warmup_child
from benchmarks.start_command import WARMUP

TINY = {"heads": 1, "groups": 1, "headdim": 16, "dstate": 16, "chunk_size": 16, "max_tokens": 16, "max_batch": 4}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the CPU")
def test_the_second_process_finds_what_the_first_one_stored(tmp_path):
    code = f"import json; from {warmup_child.__name__} import *; print(json.dumps(measure('mosaic_gpu', **{TINY})))"
    variables = (
        os.environ | start_command.caches(str(tmp_path)) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    )
    found = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=250)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    cold, warm = found
    assert cold["compiles"] > 0 == warm["compiles"]
    assert all(value > 0 for value in (cold["import"], cold["first"], warm["first"]))


def test_both_packages_are_started(monkeypatch):
    seen = []

    def run(command, **how):
        seen.append((command[-3:], how["env"]["JAX_COMPILATION_CACHE_DIR"]))
        return subprocess.CompletedProcess(command, 0, '{"import": 1.0, "first": 9.0, "compiles": 93}\n', "")

    monkeypatch.setattr(start_command.subprocess, "run", run)
    for name in warmup_child.PACKAGES:
        rows = list(start_command.start(WARMUP, name))
        assert [row.phase for row in rows] == ["import", "cold", "import", "warm"]
        assert (rows[1].op, rows[1].seconds, rows[1].compiles, rows[1].case) == (WARMUP, 9.0, 93, warmup_child.CASE)
        (cold, first), (warm, second) = seen[-2:]
        assert cold == warm == ["benchmarks.warmup_child", WARMUP, name] and first == second
