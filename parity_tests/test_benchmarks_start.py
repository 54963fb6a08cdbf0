"""`python -m benchmarks start` and `host`: all but the measurement."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import host_command, runs, start_child, start_command
from benchmarks.implementations import OWN
from benchmarks.machine import Machine
from benchmarks.ops import OPS
from benchmarks.start_command import CALLED, StartRow
from ssm_configs import Device

from .cases import select

MACHINE = Machine(torch.device("cpu"), Device("NVIDIA H200", (9, 0)), None)  # type: ignore[arg-type]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (start_command, host_command):
        monkeypatch.setattr(module, "this_machine", lambda clock: MACHINE)
        monkeypatch.setattr(module.peers, "find", lambda peers: ({}, {}))


def rows_of(path: Path) -> list[list[dict]]:
    """Of each run."""
    return [run["rows"] for run in runs.read(path, "NVIDIA_H200")]


def test_what_a_model_calls_is_measured():
    assert {"selective_state_update", "causal_conv1d", "chunk_gated_delta_rule"} <= set(CALLED)
    assert not [name for name in CALLED if name.startswith(("gdn_", "ssd_"))]
    for name in CALLED:
        case = start_command.case_of(OPS[name])
        assert case.op == name
        assert start_child.package(name, "triton") == "triton_ssm" and start_child.package(name, "xla") == "pallas_ssm"
        for peer in OPS[name].peers:
            assert start_child.package(name, peer.implementation) == peer.module


def test_a_stage_without_a_model_has_a_case():
    op = OPS["gdn_chunk_o"]
    assert min(next(iter(op.sweeps.values())).sizes) in start_command.case_of(op).dims.values()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", ("start", "host"))
def test_without_a_gpu_nothing_is_measured(verb, tmp_path):
    with pytest.raises(SystemExit, match="torch finds no CUDA device"):
        command.main([verb, "causal_conv1d", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    (
        (["start", "conv"], "op: expected some of selective_state_update, .*, got conv"),
        (["start", "--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (["start", "--implementations", "cuda"], "--implementations: expected some of triton, .*, got cuda"),
        (["host", "--calls", "0"], "--calls: expected at least 1, got 0"),
        (["host", "causal_conv1d", "--implementations", "peer:flashinfer"], "--implementations: expected some of"),
    ),
)
def test_wrong_arguments(arguments, text, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert re.search(text, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize("verb", ("start", "host"))
def test_help(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([verb, "--help"])
    assert ended.value.code == 0 and f"python -m benchmarks {verb}" in capsys.readouterr().out


def test_start_writes_a_row_for_every_phase(machine, monkeypatch, tmp_path, capsys):
    children = []

    def child(op, implementation, folder):
        children.append((op, implementation, folder))
        if implementation == "mosaic_gpu":
            raise NotImplementedError("no kernel yet")
        if implementation == "xla":
            raise RuntimeError(f"{op}, xla: it broke")
        warm = folder in [before for *_, before in children[:-1]]
        return {"import": 1.5, "first": 0.25 if warm else 2.0, "compiles": 0 if warm else 3}

    monkeypatch.setattr(start_command, "_child", child)
    assert command.main(["start", "causal_conv1d", "--repeats", "2", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "mosaic_gpu is left out: no kernel yet" in printed.out
    assert "FAILED causal_conv1d, xla: it broke" in printed.err
    data = json.loads((tmp_path / "start.json").read_text())
    (run,) = data["runs"]
    assert data["device"] == "NVIDIA_H200" and run.keys() == {"versions", "date", "command", "rows"}
    phases = [(row["phase"], row["seconds"], row["compiles"]) for row in run["rows"]]
    assert phases == [("import", 1.5, None), ("cold", 2.0, 3), ("import", 1.5, None), ("warm", 0.25, 0)] * 2
    assert {row["implementation"] for row in run["rows"]} == {"triton"}
    # Each cold start has a folder of its own.
    assert len({folder for op, name, folder in children if name == "triton"}) == 2


def test_every_cache_is_in_the_folder():
    folders = {name: value for name, value in start_command.caches("/empty").items() if name.isupper()}
    for name in ("TRITON_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME"):
        assert folders[name].startswith("/empty/")


@pytest.mark.parametrize(
    ("code", "error", "text"),
    (
        ("raise NotImplementedError('not this shape')", NotImplementedError, "not this shape"),
        ("raise ValueError('oh')", RuntimeError, "causal_conv1d, triton: ValueError: oh"),
        ("pass", RuntimeError, "causal_conv1d, triton: no output"),
    ),
)
def test_a_child_that_fails(code, error, text, monkeypatch):
    run = subprocess.run
    monkeypatch.setattr(
        start_command.subprocess, "run", lambda command, **how: run([sys.executable, "-c", code], **how)
    )
    with pytest.raises(error, match=text):
        list(start_command.start("causal_conv1d", "triton"))


def test_a_start_is_its_rows(monkeypatch):
    answer = '{"import": 1.0, "first": 2.0, "compiles": 4}'
    seen = []

    def run(command, **how):
        seen.append((command, how["env"]["TRITON_CACHE_DIR"]))
        return SimpleNamespace(returncode=0, stdout=f"a peer's chatter\n{answer}\n", stderr="")

    monkeypatch.setattr(start_command.subprocess, "run", run)
    rows = list(start_command.start("causal_conv1d", "triton"))
    case = start_command.case_of(OPS["causal_conv1d"]).name
    assert rows[1] == StartRow("causal_conv1d", "triton", "cold", 2.0, 4, case)
    assert [row.phase for row in rows] == ["import", "cold", "import", "warm"]
    (cold, first), (warm, second) = seen
    assert cold == warm and first == second and cold[-3:] == ["benchmarks.start_child", "causal_conv1d", "triton"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the CPU")
def test_caches_that_the_first_start_filled_serve_the_second():
    rows = list(start_command.start("causal_conv1d_update", "xla"))
    assert [row.phase for row in rows] == ["import", "cold", "import", "warm"]
    (cold, warm) = (row.compiles for row in rows if row.phase != "import")
    assert cold == 1 and warm == 0
    assert all(row.seconds > 0 for row in rows)


@pytest.mark.parametrize("op", ("causal_conv1d_update", "selective_state_update", "causal_conv1d"))
@pytest.mark.parametrize("name", ("triton", "xla"))
def test_host_times_a_call(op, name):
    case = select(op=op, tags=("ci",))[0]
    row = host_command.measure(OPS[op], case, OWN[name](MACHINE.device), MACHINE, calls=10)
    assert row.op == op and row.implementation == name and row.case == case.name and row.us > 0
    assert row.replay_us is None  # without a GPU there are no graphs


def test_host_dispatches_without_compiling_again():
    import jax

    import pallas_ssm
    from benchmarks.implementations import JaxOperands, JaxTwin
    from benchmarks.op import Storage, draw

    op = OPS["selective_state_update"]
    case = select(op=op.name, tags=("ci",))[0]
    operands = JaxOperands(op, draw(op, case, Storage(MACHINE.device)))
    twin = JaxTwin("xla")
    call = twin.bind(op, operands, twin.jitted(op, case), None)
    call.issue()
    with pallas_ssm.forbid_compiles():
        call.issue()  # the state that came back is an argument like the first one
    jax.block_until_ready(operands.arrays["state"])


def test_host_writes_its_rows(machine, monkeypatch, tmp_path, capsys):
    def measure(op, case, implementation, machine, calls):
        if implementation.name == "mosaic_gpu":
            raise NotImplementedError("no kernel yet")
        if implementation.name == "xla":
            raise ValueError("oh")
        return host_command.HostRow(op.name, implementation.name, case.name, float(calls), 5.0)

    monkeypatch.setattr(host_command, "measure", measure)
    assert command.main(["host", "causal_conv1d", "--calls", "7", "--out", str(tmp_path)]) == 1
    assert "mosaic_gpu is left out" in (printed := capsys.readouterr()).out and "ValueError: oh" in printed.err
    ((row,),) = rows_of(tmp_path / "host.json")
    assert row == {
        "op": "causal_conv1d", "implementation": "triton", "us": 7.0, "replay_us": 5.0,
        "case": start_command.case_of(OPS["causal_conv1d"]).name,
    }  # fmt: skip


def test_what_was_measured_before_a_time_limit_is_written(machine, monkeypatch, tmp_path):
    def measure(op, case, implementation, machine, calls):
        if implementation.name == "xla":
            raise SystemExit(143)  # what SIGTERM becomes
        return host_command.HostRow(op.name, implementation.name, case.name, 1.0, None)

    monkeypatch.setattr(host_command, "measure", measure)
    with pytest.raises(SystemExit, match="143"):
        command.main(["host", "causal_conv1d", "causal_conv1d_update", "--out", str(tmp_path)])
    (rows,) = rows_of(tmp_path / "host.json")
    assert {row["op"] for row in rows} == {"causal_conv1d"} and "triton" in {row["implementation"] for row in rows}


def test_a_later_run_replaces_only_what_it_measures_again(machine, monkeypatch, tmp_path):
    seconds = iter((1.0, 2.0, 3.0))
    monkeypatch.setattr(start_command, "_child", lambda *_: {"import": 0.5, "first": now, "compiles": 0})
    for ops in (["causal_conv1d"], ["causal_conv1d_update"], ["causal_conv1d"]):
        now = next(seconds)
        arguments = ["start", *ops, "--repeats", "1", "--implementations", "triton", "--out", str(tmp_path)]
        assert command.main([*arguments, *(["--note", "beside others"] if now == 2.0 else [])]) == 0
        if now == 1.0:  # as files of one run once were
            data = json.loads((tmp_path / "start.json").read_text())
            (run,) = data.pop("runs")
            (tmp_path / "start.json").write_text(json.dumps(data | run))
    cold = [[(row["op"], row["seconds"]) for row in rows if row["phase"] == "cold"]
            for rows in rows_of(tmp_path / "start.json")]  # fmt: skip
    assert cold == [[("causal_conv1d_update", 2.0)], [("causal_conv1d", 3.0)]]
    notes = [run.get("note") for run in runs.read(tmp_path / "start.json", "NVIDIA_H200")]
    assert notes == ["beside others", None]


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("{", "start.json: is no JSON"),
        ('{"device": "NVIDIA_B200", "runs": []}', "expected results of NVIDIA_H200, got NVIDIA_B200"),
    ),
)
def test_a_file_that_would_be_lost_stops_the_run_before_it_starts(text, message, machine, tmp_path):
    (tmp_path / "start.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        command.main(["start", "causal_conv1d", "--out", str(tmp_path)])
    assert (tmp_path / "start.json").read_text() == text
