"""Every Python example in the README runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import table

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_is_an_example_for_each_framework():
    assert any("import torch" in example for example in EXAMPLES)
    assert any("import jax" in example for example in EXAMPLES)


# Not ours: Triton's interpreter makes scalars in a way that NumPy deprecates, and warns of infinities that no GPU minds.
# Meant: a written rule where a table is missing.
STRICT = """
import warnings, ssm_configs
warnings.simplefilter("error")
for category in (DeprecationWarning, RuntimeWarning, ssm_configs.TableWarning):
    warnings.simplefilter("ignore", category)
"""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.split("\n")[0])
def test_example(example: str):
    # The environment of the session: TRITON_INTERPRET=1 and JAX on the CPU.
    command = [sys.executable, "-c", f"{STRICT}\n{example}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_the_speed_table_is_that_of_the_committed_results():
    """`python -m benchmarks table --write` renews it."""
    assert table.in_readme(README, table.table()) == README
    titles = [line.title for lines in table.LINES.values() for line in lines]
    shown = [row.split(" | ")[0].removeprefix("| ") for row in table.table().split("\n") if row.startswith("| ")]
    assert shown[2:] == titles  # in their order, none missing
