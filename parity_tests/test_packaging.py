"""The package installs, editable and as a wheel, with one framework and without the other.

Each extra gets one clean environment: first an editable install of a copy of the tree, then the wheel in its place.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[1]
PACKAGES = {"pallas_ssm": "pallas_ssm", "triton_ssm": "triton_ssm", "ssm_configs": "configs/ssm_configs"}

LOOKUP = """
import importlib.util
import ssm_configs

config = ssm_configs.lookup(
    "selective_state_update", twin={twin!r}, device=ssm_configs.Device("NVIDIA H100 80GB HBM3", (9, 0)),
    dtype="bfloat16", size=8192, headdim=64, dstate=128,
)
assert config.source == "shipped", config
for name in {absent!r}:
    assert importlib.util.find_spec(name) is None, name + " came along"
"""

# One head, one row, every number 1: the new state is exp(-1) + 1.
TORCH_CALL = """
import math
import os

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton_ssm

one = torch.ones
state = one(1, 1, 4, 8)
y = triton_ssm.selective_state_update(state, one(1, 1, 4), one(1, 1), -one(1), one(1, 1, 8), one(1, 1, 8))
assert torch.allclose(state, torch.full_like(state, math.exp(-1) + 1)), state
assert torch.allclose(y, torch.full_like(y, 8 * (math.exp(-1) + 1))), y
"""
JAX_CALL = """
import math

import jax.numpy as jnp
import pallas_ssm

one = jnp.ones
y, state = pallas_ssm.selective_state_update(
    one((1, 1, 4, 8)), one((1, 1, 4)), one((1, 1)), -one(1), one((1, 1, 8)), one((1, 1, 8))
)
assert jnp.allclose(state, math.exp(-1) + 1), state
assert jnp.allclose(y, 8 * (math.exp(-1) + 1)), y
"""

# What must work in the environment of each extra.
CHECKS = {
    "jax": JAX_CALL + LOOKUP.format(twin="pallas", absent=["torch", "triton"]),
    "torch": TORCH_CALL + LOOKUP.format(twin="triton", absent=["jax", "jaxlib"]),
}
# Triton's interpreter, which stands in for a GPU here, needs NumPy; a GPU does not.
ALSO = {"jax": [], "torch": ["numpy"]}


def run(*command: str | Path, cwd: Path) -> str:
    # PYTHONPATH would let the environments see this tree.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "JAX_PLATFORMS")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}"
    return result.stdout


def ignore(folder: str, names: list[str]) -> set[str]:
    """Leaves out what git would: dot folders, builds, caches and environments of any name."""
    return {
        name
        for name in names
        if (name.startswith(".") and name != ".gitignore")
        or name in ("build", "dist", "__pycache__")
        or os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the working tree, so that no build or editable install touches it."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("packaging") / "tree", ignore=ignore)


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    if importlib.util.find_spec("hatchling") and importlib.util.find_spec("build"):
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=tree)
    else:
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, tree, cwd=tree)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_three_packages_and_nothing_else(tree, wheel):
    expected = {
        f"{package}/{path.relative_to(tree / folder)}"
        for package, folder in PACKAGES.items()
        for path in (tree / folder).rglob("*")
        if path.is_file()
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - info == expected
    assert any(name.endswith("/licenses/LICENSE") for name in info)
    assert {"ssm_configs/devices.json", "ssm_configs/py.typed"} <= names
    assert sum(name.startswith("ssm_configs/tables/selective_state_update/") for name in names) >= 32


@pytest.mark.parametrize("extra", CHECKS)
def test_clean_install(extra, tree, wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    constraints = ("-c", tree / "constraints.txt")

    run(python, "-m", "pip", "install", *constraints, "-e", f"{tree}[{extra}]", *ALSO[extra], cwd=tmp_path)
    run(python, "-c", CHECKS[extra], cwd=tmp_path)
    assert str(tree) in run(python, "-c", "import ssm_configs; print(ssm_configs.__file__)", cwd=tmp_path)

    # In the same environment, which holds the extra's requirements already.
    run(python, "-m", "pip", "install", "--force-reinstall", "--no-deps", wheel, cwd=tmp_path)
    run(python, "-c", CHECKS[extra], cwd=tmp_path)
    assert str(tmp_path / "env") in run(python, "-c", "import ssm_configs; print(ssm_configs.__file__)", cwd=tmp_path)
    shutil.rmtree(tmp_path / "env")  # torch's is 5 GB
