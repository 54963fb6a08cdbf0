"""The package installs, editable and as a wheel, with one framework and without the other.

Each extra gets one clean environment: first an editable install of a copy of the tree, then the wheel in its place. What the
extra requires is not fetched again, which would take minutes, but linked there from this environment: those distributions,
what they require, and nothing else. pip then has no index, so a requirement that is not met stops it.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    # PYTHONPATH would let the environments see this tree, and pip's settings an index.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "JAX_PLATFORMS") and not name.startswith("PIP_")
    }
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | {"JAX_PLATFORMS": "cpu", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}"
    return result.stdout


def required(requirements: Iterable[str]) -> dict[str, metadata.Distribution]:
    """The distributions that meet the requirements, theirs and so on, by name, as they are installed here."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()

    def add(requirement: Requirement, extra: str) -> None:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            return
        name = canonicalize_name(requirement.name)
        for asked in ("", *requirement.extras):
            if (name, asked) not in seen:
                seen.add((name, asked))
                found[name] = metadata.distribution(name)
                for further in found[name].requires or ():
                    add(Requirement(further), asked)

    for requirement in requirements:
        add(Requirement(requirement), "")
    return found


def link(distributions: Iterable[metadata.Distribution], site_packages: Path) -> None:
    for distribution in distributions:
        assert distribution.files, f"{distribution.name}: has no record of its files"
        for file in distribution.files:
            # Not its commands; and bytecode only where it was written.
            if ".." not in file.parts and os.path.exists(file.locate()):
                place = site_packages / file
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(file.locate())


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
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=tree)
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


@pytest.fixture(scope="module")
def editable(tree, tmp_path_factory) -> Path:
    """What `pip install -e` makes of the tree and installs, made by this environment's hatchling."""
    folder = tmp_path_factory.mktemp("editable")
    build = "import sys; from hatchling.build import build_editable; build_editable(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=tree)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.parametrize("extra", CHECKS)
def test_clean_install(extra, tree, wheel, editable, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    extras = tomllib.loads((tree / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    (site_packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    link(required([*extras[extra], *ALSO[extra]]).values(), site_packages)

    pip = (sys.executable, "-m", "pip", "--python", python)
    for package, options, place in (
        (f"{editable}[{extra}]", (), tree),
        # In the same environment, which holds the extra's requirements already.
        (wheel, ("--force-reinstall", "--no-deps"), tmp_path / "env"),
    ):
        said = run(*pip, "install", *options, package, cwd=tmp_path)
        assert re.findall("Installing collected packages: (.*)", said) == ["twin-ssm"], said
        here = f"assert ssm_configs.__file__.startswith({str(place)!r}), ssm_configs.__file__"
        run(python, "-c", f"{CHECKS[extra]}\n{here}", cwd=tmp_path)
