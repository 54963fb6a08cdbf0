"""A kernel has one hash, whichever kernels a process has met before: Triton's cache on disk goes by it."""

import json
import os
import subprocess
import sys

import pytest

_HASHES = """
import importlib, json, pkgutil, sys
import triton_ssm
from triton.language.core import constexpr
from triton.runtime.jit import JITCallable
from triton_ssm import _plans
from triton_ssm._hashes import settle
for module in pkgutil.walk_packages(triton_ssm.__path__, "triton_ssm."):
    importlib.import_module(module.name)
import gc
launchers = [found for found in gc.get_objects() if isinstance(found, _plans.Launcher)]
kernels = {f"{l._kernel.__module__}.{l._kernel.__name__}": l._kernel for l in launchers}
found = {}
for name in sorted(kernels, reverse="reverse" in sys.argv):
    if "settle" in sys.argv:
        settle(kernels[name])
    constants = {}
    key = kernels[name].cache_key
    for (constant, _), (value, _) in kernels[name].used_global_vals.items():
        if isinstance(value, constexpr):
            constants.setdefault(constant, set()).add(str(value))
    found[name] = [key, {constant: sorted(values) for constant, values in constants.items()}]
print(json.dumps(found))
"""


def hashes(*arguments: str) -> dict[str, tuple[str, dict[str, list[str]]]]:
    """By kernel: its hash, and the values of the constants that went into it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _HASHES, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def settled() -> dict[str, tuple[str, dict[str, list[str]]]]:
    return hashes("settle")


def test_the_order_does_not_matter(settled):
    assert len(settled) > 20
    assert hashes("settle", "reverse") == settled


def test_two_constants_of_one_name_are_equal(settled):
    """Triton puts them in the order of their modules' addresses."""
    assert all(len(values) == 1 for _, constants in settled.values() for values in constants.values())


def test_what_this_is_for():
    """Once Triton does it by itself, `_hashes` can go."""
    assert hashes() != hashes("reverse")
