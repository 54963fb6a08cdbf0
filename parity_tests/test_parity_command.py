"""`python -m parity_tests` as a user meets it: exit status, report, page, candidates."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from . import __main__ as parity

ONE_OP = ("--op", "selective_state_update")
ONE_CASE = (*ONE_OP, "--match", "nothing optional")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "parity_tests", "--cpu", *arguments], capture_output=True, text=True, timeout=250
    )


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def candidate(folder: Path, body: str) -> str:
    (folder / "mine.py").write_text(body)
    return "mine:update"


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    root = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(root), str(root / "configs")]))
    return tmp_path


@pytest.fixture
def run_here(path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The same without a process, which takes seconds to start."""
    monkeypatch.setattr(sys, "path", [str(path), *sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def call(*arguments: str) -> Done:
        try:
            code = parity.main(["--cpu", *arguments])
        except SystemExit as stopped:
            assert isinstance(stopped.code, int)
            code = stopped.code
        finally:
            sys.modules.pop("mine", None)
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return call


def test_agreement_is_exit_status_0_and_says_on_what_it_ran(path):
    page = path / "parity.html"
    done = run(*ONE_CASE, "--html", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on the CPU, through the Triton interpreter and the Mosaic GPU interpreter" in done.stdout
    assert "1 of 1 cases agree" in done.stdout
    for word in ("triton", "mosaic_gpu", "xla", "vs oracle", "twins", "tolerance", "BLOCK_SIZE_M"):
        assert word in done.stdout
    html = page.read_text()
    assert "nothing optional" in html and "1 of 1 cases agree" in html and "http" not in html.lower()


def test_a_good_torch_candidate_passes(path):
    done = run(*ONE_CASE, "--candidate", candidate(path, "import torch\n" + TORCH))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "candidate mine:update (torch) stands in the place of 'triton'" in done.stdout


@pytest.mark.parametrize(
    "right, wrong, seen",
    [
        ("y = (new", "y = 1.01 * (new", "triton against the oracle: y: error 1.0e-02"),
        ("] = new", "] = new.to(torch.bfloat16)", "triton against the oracle: state: error"),
        ("return y", "raise RuntimeError('not today')", "triton: RuntimeError: not today"),
        ("return y", "return y * float('nan')", "triton against the oracle: y: error nan"),
    ],
)
def test_a_wrong_candidate_is_exit_status_1(path, run_here, right, wrong, seen):
    assert right in TORCH
    done = run_here(*ONE_CASE, "--candidate", candidate(path, "import torch\n" + TORCH.replace(right, wrong)))
    assert done.returncode == 1, done.stdout + done.stderr
    assert seen in done.stdout and "1 FAIL" in done.stdout


def test_a_jax_candidate_takes_the_pallas_twins_place(path, run_here):
    body = (
        TORCH.replace("torch.", "jnp.")
        .replace("state[: len(x)] = new", "state = state.at[: len(x)].set(new)")
        .replace("return y", "return y, state")
    )
    body = body.replace("repeat_interleave(2, 1)", "repeat(2, 1)")
    done = run_here(*ONE_CASE, "--candidate", candidate(path, "import jax.numpy as jnp\n" + body))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(jax) stands in the place of 'mosaic_gpu'" in done.stdout


@pytest.mark.parametrize(
    "arguments, seen",
    [
        (("--candidate", "nothing"), "expected module:function, got 'nothing'"),
        (("--candidate", "no_such_module:f"), "cannot import 'no_such_module'"),
        (("--candidate", "math:pi"), "expected a function 'pi' in 'math'"),
        (("--candidate", "math:sin"), "--framework: expected torch or jax to be named"),
        (("--tags", "nonsense"), "no case has nonsense"),
        (("--match", "nonsense"), "no case has 'nonsense' in its name"),
        (
            ("--op", "causal_conv1d", "selective_state_update", "--candidate", "math:sin"),
            "--candidate: expected one operator",
        ),
        (("--op", "nonsense"), "--op: expected some of"),
    ],
)
def test_wrong_arguments_are_named(run_here, arguments, seen):
    done = run_here(*ONE_OP[: 0 if "--op" in arguments else 2], *arguments)
    assert done.returncode == 2 and seen in done.stderr, done.stderr


# For the case without options, of two heads to a group: what somebody's own decode step may look like.
TORCH = """
def update(state, x, dt, A, B, C, dt_softplus):
    B, C = B.repeat_interleave(2, 1), C.repeat_interleave(2, 1)
    decay = torch.exp(A * dt)[:, :, None, None]
    new = state[: len(x)] * decay + (dt[:, :, None] * x)[:, :, :, None] * B[:, :, None, :]
    y = (new * C[:, :, None, :]).sum(-1)
    state[: len(x)] = new
    return y
"""
