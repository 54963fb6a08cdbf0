"""docs/layers.md: its examples run one after another, as a reader runs them, and compare themselves with each other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pallas_ssm
import triton_ssm

from .runners import CHEAP_COMPILES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "layers.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
# Devices that JAX makes of the CPU, and what `conftest` does for this process: cheap compiles.
CPU = {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {CHEAP_COMPILES}",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


def test_examples():
    environment = os.environ | CPU | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "configs")])}
    program = "\n".join(EXAMPLES) + "\nassert mesh.size == 2 and len(gradients[0]) == 5"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_what_the_tables_name_exists():
    names = set(re.findall(r"`layouts\.(\w+)\(", PAGE))
    assert names and all(hasattr(package.layouts, name) for name in names for package in (triton_ssm, pallas_ssm))
    for name in ("from_config", "slice", "mamba_parts", "gdn_parts"):
        assert name in PAGE and hasattr(triton_ssm.ModelDims, name)
