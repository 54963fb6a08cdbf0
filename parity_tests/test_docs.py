"""The pages of docs/: examples run, commands exist, generated parts are fresh, links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import docs
from ssm_configs import SPECS

from . import __main__ as parity
from .operators import OPERATORS
from .tolerances import TOLERANCES

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
# The page on warming up has tests of its own.
OURS = {name: text for name, text in PAGES.items() if name != "warmup.md"}


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of the fenced blocks."""
    found = ((name, re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)) for name, text in OURS.items())
    return [(name, text) for name, texts in found for text in texts]


# Those of layers.md build on each other and have a test of their own.
EXAMPLES = [
    (name, text) for name, text in blocks("python") if name != "layers.md" and not text.startswith("# my_ops.py")
]
COMMANDS = [(name, line) for name, text in blocks("console") for line in text.splitlines()]


def named(example: tuple[str, str]) -> str:
    return example[0]


@pytest.mark.parametrize("example", EXAMPLES, ids=named)
def test_example(example):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "configs")])}
    done = subprocess.run([sys.executable, "-W", "error", "-c", example[1]], capture_output=True, text=True, timeout=60,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_there_are_examples_of_tuning_vllm_and_parity():
    assert {name for name, _ in EXAMPLES} >= {"tuning.md", "vllm.md", "parity.md"}
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command[0]}: {command[1]}")
def test_command(command, monkeypatch):
    """It is understood as it stands; what it does has tests elsewhere."""
    words = shlex.split(command[1])
    if words[:3] == ["python", "-m", "benchmarks"]:
        arguments = benchmarks.parser().parse_args(words[3:])
        arguments.validate(arguments)
    elif words[:3] == ["python", "-m", "parity_tests"]:
        parity._parser().parse_args(words[3:])
    else:
        assert words[0] == "export" and words[1].partition("=")[0] in ("SSM_TUNED_CONFIG_FOLDER",), command


def test_inline_commands_are_understood():
    for name, text in OURS.items():
        for line in re.findall(r"`(python\s+-m\s+benchmarks[^`]*)`", text):
            words = shlex.split(line)[3:]
            assert words and words[0] in str(benchmarks.parser().format_help()), f"{name}: {line}"
            if len(words) > 1:
                benchmarks.parser().parse_args(words)


def test_the_port_of_parity_md(tmp_path, monkeypatch, capsys):
    (source,) = [text for name, text in blocks("python") if text.startswith("# my_ops.py")]
    (line,) = [line for name, line in COMMANDS if "parity_tests" in line]
    (tmp_path / "my_ops.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_ops", raising=False)
    words = shlex.split(line)[3:]
    assert parity.main(words) == 0
    said = capsys.readouterr().out
    assert "candidate my_ops:update (torch) stands in the place of 'triton'" in said and "1 of 1 cases agree" in said


def test_generated_parts_are_fresh():
    """`python -m benchmarks docs` renews them."""
    for name, text in docs.pages().items():
        assert text == PAGES[name], f"{name} is stale: run `python -m benchmarks docs`"


def test_the_check_says_what_is_stale(tmp_path, monkeypatch, capsys):
    for name, text in PAGES.items():
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.setattr(docs, "FOLDER", tmp_path)
    monkeypatch.setattr(docs, "support", lambda: PAGES["support.md"])
    numerics = tmp_path / "numerics.md"
    numerics.write_text(re.sub(r"\d\.\de-\d\d", "9.9e-99", PAGES["numerics.md"]), "utf-8")
    assert benchmarks.main(["docs", "--check"]) == 1
    assert "docs/numerics.md: stale" in capsys.readouterr().out and "9.9e-99" in numerics.read_text("utf-8")
    assert benchmarks.main(["docs"]) == 0 and benchmarks.main(["docs", "--check"]) == 0
    with pytest.raises(ValueError, match="expected <!-- tolerances -->"):
        docs.with_tolerances("no marks")


def test_support_covers_every_operator_and_table():
    text = PAGES["support.md"]
    for op in OPERATORS:
        assert f"\n## `{op}`\n" in text and f"| `{op}` |" in text
    for spec in SPECS.values():
        assert any(operator.table == spec.name for operator in OPERATORS.values())
        for knob in (*spec.triton_knobs, *spec.pallas_knobs):
            assert f"`{knob.name}`" in text


def test_numerics_has_a_line_for_every_operator_and_limit():
    text = PAGES["numerics.md"]
    points = text.partition("## Rounding points")[2].partition("## Tolerances")[0]
    assert all(f"`{op}`" in points for op in OPERATORS)
    assert text.count("\n| `") - points.count("\n| `") == len(TOLERANCES)


LINKING = PAGES | {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "CHANGELOG.md")}


@pytest.mark.parametrize("name", LINKING)
def test_links_lead_somewhere(name):
    here = ROOT / "docs" if name in PAGES else ROOT
    for target in re.findall(r"\]\(([^)]+)\)", LINKING[name]):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = here / file if file else here / name
            assert path.exists(), target
            assert not anchor or anchor in _anchors(path.read_text("utf-8")), target


def test_every_page_is_in_the_index():
    assert set(re.findall(r"^\| \[(\w+\.md)\]", PAGES["index.md"], re.MULTILINE)) == set(PAGES) - {"index.md"}


def _anchors(text: str) -> set[str]:
    """Those that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
