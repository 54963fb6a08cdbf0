"""Rows from elsewhere: which knobs they give, what is checked before it is timed, the file they end in, and what is shown."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import transfer
from benchmarks.implementations import OWN
from benchmarks.machine import Machine
from benchmarks.ops import OPS
from benchmarks.report import sources, transferred
from benchmarks.report.blocks import Source, Table
from benchmarks.timing import Sample
from benchmarks.tuning_log import config_of
from ssm_configs import SPECS, Device, lookup, read_table, shipped_tables

from .test_benchmarks_tune import Definition, FakeClock

OP = OPS["selective_state_update"]
SPEC = SPECS[OP.name]
H200 = Device("NVIDIA H200", (9, 0))
STATICS = {"headdim": 64, "dstate": 128}
ROOT = Path(__file__).parents[1]
VLLM = Path(__file__).parent / "data" / "vllm_tables" / OP.name
FILE = "headdim=64,dstate=128,device_name=NVIDIA_H200,cache_dtype=float32.json"


def entry_of(device, size, dtype="float32"):
    table = next(
        table
        for table in shipped_tables(OP.name)
        if (table.device_name, table.dtype, table.statics) == (device, dtype, STATICS)
    )
    return read_table(table.path, SPEC, STATICS).nearest(size)


@pytest.mark.parametrize("twin", ["triton", "pallas"])
def test_the_own_row_is_what_a_call_gets(twin):
    for size in (64, 8192):
        found = transfer.origins(SPEC, twin, H200, STATICS, "float32", size)
        assert found["own"] == lookup(OP.name, twin=twin, device=H200, dtype="float32", size=size, **STATICS).knobs
        elsewhere = Device("Some GPU", (9, 0))
        rule = SPEC.launch_knobs(twin, SPEC.heuristic(STATICS, "float32", elsewhere, size), None, STATICS)
        assert found["heuristic"] == rule


def test_each_twin_gets_the_others_row_in_its_own_words():
    entry = entry_of("NVIDIA_H200", 8192)
    on_pallas = transfer.origins(SPEC, "pallas", H200, STATICS, "float32", 8192)["twin"]
    assert on_pallas == SPEC.pallas_rule(entry.own.get("triton", entry.shared), STATICS)
    on_triton = transfer.origins(SPEC, "triton", H200, STATICS, "float32", 8192)["twin"]
    pallas = SPEC.launch_knobs("pallas", entry.shared, entry.own.get("pallas"), STATICS)
    rule = SPEC.heuristic(STATICS, "float32", H200, 8192)
    assert on_triton == rule | {"BLOCK_SIZE_M": pallas["BLOCK_SIZE_M"]}


def test_a_value_that_triton_may_not_have_is_left_to_the_rule():
    statics = {"headdim": 80, "dstate": 128}
    table = next(one for one in shipped_tables(OP.name) if (one.device_name, one.statics) == ("NVIDIA_H200", statics))
    entries = read_table(table.path, SPEC, statics).entries
    odd = next(entry for entry in entries if entry.own.get("pallas", {}).get("BLOCK_SIZE_M") in (20, 40, 80))
    rule = SPEC.heuristic(statics, table.dtype, H200, odd.size)
    assert transfer.borrowed(SPEC, "triton", odd, rule, statics) == rule


def test_other_devices_tables_and_vllms_own():
    found = transfer.origins(SPEC, "triton", H200, STATICS, "float32", 8192, VLLM / FILE)
    assert found["device:NVIDIA_B200"] == entry_of("NVIDIA_B200", 8192).shared
    assert {name for name in found if name.startswith("device:")} == {
        "device:NVIDIA_H100_80GB_HBM3", "device:NVIDIA_B200", "device:NVIDIA_GB200",
        "device:NVIDIA_RTX_PRO_6000_Blackwell_Server_Edition",
    }  # fmt: skip
    assert found["vllm"] == {key: value for key, value in json.loads((VLLM / FILE).read_text())["8192"].items()}
    assert "vllm" not in transfer.origins(SPEC, "triton", H200, STATICS, "float32", 8192)
    assert transfer.vllm_table(OPS["causal_conv1d"], VLLM / FILE) is None


class Bench:
    """Times by BLOCK_SIZE_M; one value of it computes the wrong thing."""

    def __init__(self):
        self.checked, self.timed = [], []

    def compile(self, pairs):
        pass

    def check(self, case, knobs):
        self.checked.append(config_of(knobs))
        return ("state: relative error 1" if knobs["BLOCK_SIZE_M"] == 2 else None), {"y": 1e-3, "state": 2e-3}

    def time(self, case, configs, repeats):
        self.timed += map(config_of, configs)
        return [Sample(us, us - 1, us + 1, ("kernel",)) for us in (float(knobs["BLOCK_SIZE_M"]) for knobs in configs)]


def test_what_is_wrong_is_not_timed_and_what_is_the_same_is_timed_once():
    bench = Bench()
    found = {
        "own": {"BLOCK_SIZE_M": 4},
        "twin": {"BLOCK_SIZE_M": 4},
        "heuristic": {"BLOCK_SIZE_M": 2},
        "vllm": {"BLOCK_SIZE_M": 8},
    }
    case = OP.case(64, STATICS, "float32")
    rows = list(transfer.measure(OP, bench, case, STATICS, "float32", 64, "triton", found))
    assert [(row.origin, row.us) for row in rows] == [("own", 4.0), ("twin", 4.0), ("heuristic", None), ("vllm", 8.0)]
    assert rows[2].wrong == "state: relative error 1" and rows[0].wrong is None and rows[0].error == 2e-3
    assert len(bench.checked) == 3 and len(bench.timed) == 2


def test_an_operators_run_replaces_its_own_and_no_other(tmp_path):
    path = tmp_path / "new" / transfer.FILE
    row = transfer.Row(
        statics=STATICS, dtype="float32", size=64, twin="triton", origin="own", knobs={"BLOCK_SIZE_M": 4}, us=4.0
    )
    for op, command_line in (("a", "first"), ("b", "second"), ("a", "third")):
        transfer.write(path, op, "NVIDIA_H200", {"torch": "2.11.0"}, command_line, [row])
    runs = transfer.read(path)
    assert {op: head["command"] for op, (head, _) in runs.items()} == {"a": "third", "b": "second"}
    assert runs["b"][1] == [row] and [one.name for one in path.parent.iterdir()] == [transfer.FILE]
    with pytest.raises(ValueError, match="not JSON compliant"):
        nan = transfer.Row(
            statics=STATICS, dtype="float32", size=64, twin="triton", origin="own", knobs={}, us=float("nan")
        )
        transfer.write(path, "a", "NVIDIA_H200", {}, "fourth", [nan])
    assert transfer.read(path) == runs


def test_from_end_to_end(tmp_path, monkeypatch, capsys):
    """The definition in the kernel's place, wrong with one config; real tables, checks and file, a made-up clock."""

    faulty = {64, 32}  # the rule's rows for dstate 16, and those of the float32 table
    broken = set(faulty)

    def spoil(size, knobs, results):
        if knobs["BLOCK_SIZE_M"] in broken:
            results["y"][0] += 1

    clock = FakeClock(lambda size, rows: 10.0 + rows)
    monkeypatch.setitem(OWN, "triton", lambda device: Definition(spoil=spoil))
    machine = Machine(torch.device("cpu"), H200, clock)
    monkeypatch.setattr(transfer, "this_machine", lambda name: machine)
    chosen = ["--headdim", "64", "--dstate", "16", "--twin", "triton", "--sizes", "8", "--out", str(tmp_path)]
    assert command.main(["transfer", OP.name, *chosen]) == 1  # what does not run at home is a failure
    error = capsys.readouterr().err
    assert "FAILED triton heuristic" in error and "FAILED triton own" in error
    ((head, rows),) = transfer.read(tmp_path / transfer.FILE).values()
    assert head["command"].startswith("python -m benchmarks")
    assert {(row.dtype, row.origin) for row in rows} >= {
        ("float32", "own"),
        ("float16", "twin"),
        ("float16", "heuristic"),
    }
    for row in rows:
        assert (row.us is None) == (row.knobs["BLOCK_SIZE_M"] in faulty) == bool(row.wrong), row
        assert row.us in (None, 10.0 + row.knobs["BLOCK_SIZE_M"])
    broken.clear()
    assert command.main(["transfer", OP.name, *chosen]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: op"),
        (["no_such_op"], "invalid choice: 'no_such_op'"),
        ([OP.name, "--clock", "events"], "cannot time JAX: add --twin triton"),
        ([OP.name, "--sizes", "200"], "multiple of 128, got 200"),
    ],
)
def test_argument_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["transfer", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_without_a_gpu_or_a_table_nothing_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        command.main(["transfer", OP.name])
    machine = Machine(torch.device("cpu"), Device("NVIDIA X1", (9, 0)), FakeClock(lambda size, rows: 1.0))
    monkeypatch.setattr(transfer, "this_machine", lambda name: machine)
    assert command.main(["transfer", OP.name, "--out", str(tmp_path)]) == 1
    assert "no table of NVIDIA_X1" in capsys.readouterr().err and not list(tmp_path.iterdir())


def row(origin: str, us: float | None, size: int = 64, twin: str = "triton", **more) -> transfer.Row:
    return transfer.Row(
        statics=STATICS, dtype="float32", size=size, twin=twin, origin=origin, knobs={"BLOCK_SIZE_M": 4}, us=us, **more
    )


def measured(*rows: transfer.Row) -> sources.Measured:
    return sources.Measured(Source("transfer.json", "NVIDIA H200", "a command", "a date", "versions"), rows)


def tables(*rows: transfer.Row) -> list[Table]:
    return [block for block in transferred.section(OP.name, measured(*rows)).blocks if isinstance(block, Table)]


def test_an_own_row_that_another_beats_is_shown():
    close = [row("own", 10.0), row("heuristic", 9.9), row("twin", 12.0)]
    assert [table.caption for table in tables(*close)] == [
        f"{OP.name}, time over that of the own row", f"{OP.name}, every row from elsewhere",
    ]  # fmt: skip
    beating = [row("own", 20.0, 128), row("heuristic", 19.0, 128), row("vllm", 16.0, 128)]
    summary, beaten, _ = tables(*close, *beating)
    assert "by more than 3%" in beaten.caption
    ((sizes, _, origin, *figures, _, _),) = beaten.rows  # the fastest one alone
    assert sizes.endswith(", 128") and (origin, figures) == ("vLLM's own table", ["20.00", "16.00", "0.80"])
    by_rule = next(line for line in summary.rows if line[1] == "the written rule")
    assert by_rule[2:] == ["0.97", "0.99", "0.95", "2", "0"]  # median, most, least
    assert SPEC.size_key in transferred.section(OP.name, measured(*close)).paragraphs[0]


def test_the_table_of_the_docs():
    rows = [row("own", 10.0), row("heuristic", 15.0), row("device:NVIDIA_B200", 11.0), row("device:NVIDIA_GB200", 13.0)]
    rows += [row("own", 4.0, 128), row("heuristic", None, 128, wrong="y"), row("own", 5.0, twin="pallas")]
    text = transferred.with_table(f"a\n{transferred.BEGIN}stale\n{transferred.END}\nb\n", {"op": measured(*rows)})
    assert text.splitlines()[4:6] == [
        "| `op` | triton | 2 | 1.50, 1.50, 1 fail |  | 1.20, 1.30 |  |",
        "| `op` | pallas | 1 |  |  |  |  |",
    ]
    assert text.startswith("a\n") and text.endswith(f"{transferred.END}\nb\n") and "stale" not in text
    with pytest.raises(ValueError, match="expected <!-- transfer -->"):
        transferred.with_table("no marks", {})
    page = (ROOT / "docs" / "tuning.md").read_text("utf-8")
    assert transferred.with_table(page, sources.load(ROOT / "benchmarks" / "results" / "NVIDIA_H200").transfer) == page


def test_the_version_of_a_peer_whose_table_was_measured(monkeypatch):
    monkeypatch.setattr(type(OP.peers[0]), "version", lambda peer: f"that of {peer.name}")
    found = transfer._versions(OP, [row("own", 1.0), row("vllm", 1.0)])
    assert found["vllm"] == "that of vllm" and found.keys() - transfer._versions(OP, [row("own", 1.0)]) == {"vllm"}
