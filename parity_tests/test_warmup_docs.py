"""docs/warmup.md: its examples run, and it names what there is."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import pallas_ssm
import triton_ssm
from benchmarks import __main__ as benchmarks
from ssm_configs.models import warming

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "warmup.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CONFIG = {
    "model_type": "nemotron_h", "mamba_num_heads": 2, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1,
    "conv_kernel": 4, "chunk_size": 16, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(("index", "package"), enumerate(("triton_ssm", "pallas_ssm")))
def test_example(index, package, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "configs")])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXAMPLES[index]],
        capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{package}: ") and " warm: " in done.stdout


def test_there_are_no_other_examples():
    assert len(EXAMPLES) == 2


def test_the_table_has_every_choice():
    names = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert {"forms", "entries", "sliced"} <= set(names) <= set(inspect.signature(triton_ssm.warmup).parameters)
    for choice in (*warming.FORMS, *warming.ENTRIES):
        assert f'`"{choice}"`' in PAGE
    for name in ("cache_dir", "programs"):
        assert name in inspect.signature(pallas_ssm.warmup).parameters and f"{name}=" in PAGE


def test_commands():
    (exports, commands) = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for line in commands.splitlines():
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "benchmarks"]
        arguments = benchmarks.parser().parse_args(words[3:])
        arguments.validate(arguments)
    for line in exports.splitlines():
        name = line.removeprefix("export ").partition("=")[0]
        # Triton's variable is the one its own knob reads; JAX's are its options in capitals.
        if name.startswith("JAX_"):
            import jax

            assert hasattr(jax.config, name.lower())
        else:
            assert name == "TRITON_CACHE_DIR"
