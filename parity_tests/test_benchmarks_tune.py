"""The tuner, with real checks on CPU tensors, a fake clock, and a fake implementation that can be told to go wrong."""

import dataclasses
import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import tables, tune_command, winners
from benchmarks.implementations import TorchOperands
from benchmarks.lab import Lab
from benchmarks.machine import Machine
from benchmarks.op import Storage
from benchmarks.ops import OPS
from benchmarks.timing import Call, Sample
from benchmarks.tune import Job, TuningError, is_complete, tune
from benchmarks.tuning_log import TuningLog, config_of
from ssm_configs import Device, lookup, read_table

CPU = torch.device("cpu")
H200 = Device("NVIDIA H200", (9, 0))
STATICS = {"headdim": 16, "dstate": 16}
SIZES = (8, 16, 128, 256)
CANDIDATES = {
    "triton": [{"BLOCK_SIZE_M": rows, "num_warps": 4} for rows in (4, 8, 16, 32)],
    "pallas": [{"BLOCK_SIZE_M": rows, "tiles_per_block": 1, "use_tma": False} for rows in (4, 8, 16)],
}
OP = dataclasses.replace(
    OPS["selective_state_update"], first_sizes=(16, 256), candidates=lambda twin, statics, dtype: CANDIDATES[twin]
)
IDENTITY = {"device": "NVIDIA H200", "triton": "3.6.0"}


class Definition:
    """The op by its own float64 reference; `spoil(size, knobs, results)` makes it wrong."""

    name, framework, slack = "definition", "torch", 1.0

    def __init__(self, static_shapes=False, spoil=lambda size, knobs, results: None):
        self.static_shapes, self.spoil = static_shapes, spoil

    def takes(self, case):
        return True

    def compiled_case(self, op, case):
        return case if self.static_shapes else op.single(case)

    def compile(self, op, case, knobs):
        return None

    def bind(self, op, operands: TorchOperands, compiled, knobs):
        x = operands.tensors["x"]
        size = x.shape[0] * x.shape[1]
        S, _, P, N = operands.tensors["state"].shape
        case = op.case(size, {"headdim": P, "dstate": N}, str(operands.tensors["state"].dtype).removeprefix("torch."))
        assert case.dims["S"] == S

        def issue():
            results = operands.results()
            for name, rows, expected in list(op.pieces(case, operands.tensors)):
                results[name][rows] = expected.to(results[name].dtype)
            self.spoil(size, knobs, results)

        return Call(json.dumps([size, knobs]), "torch", issue, lambda: None)


class FakeClock:
    """Times by a formula; can be made to fail after so many sessions."""

    def __init__(self, us, sessions=10**9):
        self.us, self.sessions, self.timed = us, sessions, []

    def supports(self, framework):
        return True

    def cold_us(self, calls, repeats):
        if not self.sessions:
            raise KeyboardInterrupt
        self.sessions -= 1
        samples = []
        for call in calls:
            size, knobs = json.loads(call.label)
            self.timed.append((size, knobs["BLOCK_SIZE_M"]))
            us = float(self.us(size, knobs["BLOCK_SIZE_M"]))
            samples.append(Sample(us, us, us, ("kernel",)))
        return samples


def lab(clock, **definition):
    return Lab(OP, Definition(**definition), clock, Storage(CPU))


def log(tmp_path, twin="triton", identity=IDENTITY):
    return TuningLog(tmp_path / f"{twin}.jsonl", identity)


def job(twin="triton", sizes=SIZES):
    return Job(OP, twin, STATICS, "float32", sizes)


def rows(chosen):
    return {size: dict(config)["BLOCK_SIZE_M"] for size, config in chosen.items()}


def smaller_is_faster(size, rows):
    return 10 + rows


# -- the winner rule


def test_noise_does_not_choose():
    a, b = config_of({"r": 4}), config_of({"r": 8})
    times = {8: {a: 10.0, b: 9.9}, 16: {a: 10.0, b: 11.0}, 32: {a: 20.0, b: 25.0}}
    assert winners.choose(times) == {8: a, 16: a, 32: a}  # b wins size 8 by 1 %, a serves all three


def test_a_real_difference_does_choose():
    a, b = config_of({"r": 4}), config_of({"r": 8})
    times = {8: {a: 10.0, b: 9.8}, 16: {a: 10.0, b: 11.0}}
    assert winners.choose(times) == {8: b, 16: a}


def test_the_faster_of_two_that_serve_the_same():
    a, b = config_of({"r": 4}), config_of({"r": 8})
    assert winners.choose({8: {a: 10.1, b: 10.0}, 16: {a: 10.0, b: 10.0}}) == {8: b, 16: b}


# -- tuning


def test_every_size_gets_the_fastest(tmp_path):
    clock, record = FakeClock(lambda size, rows: 10 + abs(rows - (4 if size < 128 else 16))), log(tmp_path)
    tune(job(), lab(clock), record)
    assert is_complete(record, SIZES)
    assert rows(winners.from_log(record, SIZES)) == {8: 4, 16: 4, 128: 16, 256: 16}
    # H=8 is a Triton kernel of its own and sees the finalists only; H=128 serves 128 and 256.
    assert sorted(clock.timed) == sorted(
        [(size, rows) for size in (16, 128, 256) for rows in (4, 8, 16, 32)] + [(8, 4), (8, 8), (8, 16)]
    )


def test_where_each_size_is_a_compile_the_best_go_on(tmp_path):
    clock = FakeClock(smaller_is_faster)
    tune(job("pallas"), lab(clock, static_shapes=True), log(tmp_path, "pallas"))
    assert [rows for size, rows in clock.timed if size == 256] == [4, 8, 16]
    assert {size for size, _ in clock.timed} == set(SIZES)


def test_the_written_rule_is_timed_at_every_size(tmp_path):
    """What is best at 8 is none of the best where all candidates are timed; here it is no candidate at all."""
    clock = FakeClock(lambda size, rows: 10 + abs(rows - (32 if size == 8 else 4)))
    slow, record = job("pallas", sizes=(8, 16, 256)), log(tmp_path, "pallas")
    tune(slow, lab(clock, static_shapes=True), record, rule=lambda size: CANDIDATES["pallas"][0] | {"BLOCK_SIZE_M": 32})
    assert rows(winners.from_log(record, slow.sizes)) == {8: 32, 16: 4, 256: 4}
    assert (16, 32) not in clock.timed


def _wrong_y(size, knobs, results):
    if knobs["BLOCK_SIZE_M"] == 4:
        results["y"][0, 0, 0] += 1


def _wrong_state(size, knobs, results):
    if knobs["BLOCK_SIZE_M"] == 4:
        results["state"][0, 0, 0, 0] += 1


def _nan(size, knobs, results):
    if knobs["BLOCK_SIZE_M"] == 4:
        results["state"][-1, -1, -1, -1] = float("nan")


def _raises(size, knobs, results):
    if knobs["BLOCK_SIZE_M"] == 4:
        raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize("spoil", [_wrong_y, _wrong_state, _nan, _raises])
def test_a_wrong_candidate_never_wins_however_fast(tmp_path, spoil):
    clock, record = FakeClock(smaller_is_faster), log(tmp_path)
    tune(job(), lab(clock, spoil=spoil), record)
    assert set(rows(winners.from_log(record, SIZES)).values()) == {8}
    assert all(rows != 4 for _, rows in clock.timed)


def test_a_winner_that_fails_at_its_own_size_is_replaced_there_alone(tmp_path):
    def wrong_at_one_size(size, knobs, results):
        if size == 128:
            _wrong_state(size, knobs, results)

    record = log(tmp_path)
    tune(job(), lab(FakeClock(smaller_is_faster), spoil=wrong_at_one_size), record)
    assert rows(winners.from_log(record, SIZES)) == {8: 4, 16: 4, 128: 8, 256: 4}


def test_no_correct_candidate_is_an_error_and_no_table(tmp_path):
    def all_wrong(size, knobs, results):
        results["y"][0] = 0

    record = log(tmp_path)
    with pytest.raises(TuningError, match="no candidate computes the right thing"):
        tune(job(), lab(FakeClock(smaller_is_faster), spoil=all_wrong), record)
    assert not is_complete(record, SIZES)


# -- the log


def test_a_crash_costs_one_session(tmp_path):
    first = FakeClock(smaller_is_faster, sessions=2)
    with pytest.raises(KeyboardInterrupt):
        tune(job(), lab(first), log(tmp_path))
    with (tmp_path / "triton.jsonl").open("a") as file:
        file.write('{"kind": "time", "size": 12')  # the line that the crash cut short
    second, record = FakeClock(smaller_is_faster), log(tmp_path)
    tune(job(), lab(second), record)
    assert not set(first.timed) & set(second.timed)
    assert is_complete(record, SIZES) and is_complete(log(tmp_path), SIZES)

    third = FakeClock(smaller_is_faster, sessions=0)
    tune(job(), lab(third), log(tmp_path))  # nothing is left to do


def test_measurements_of_another_version_do_not_count(tmp_path):
    tune(job(), lab(FakeClock(smaller_is_faster)), log(tmp_path))
    newer = log(tmp_path, identity=IDENTITY | {"triton": "3.7.0"})
    assert not is_complete(newer, SIZES) and not newer.times
    clock = FakeClock(smaller_is_faster)
    tune(job(), lab(clock), newer)
    assert clock.timed


def test_a_config_that_kills_the_process_twice_is_left_out(tmp_path):
    def dies(size, knobs, results):
        if knobs["BLOCK_SIZE_M"] == 4:
            raise SystemExit

    for _ in range(2):
        with pytest.raises(SystemExit):
            tune(job(), lab(FakeClock(smaller_is_faster), spoil=dies), log(tmp_path))
    record = log(tmp_path)
    tune(job(), lab(FakeClock(smaller_is_faster), spoil=dies), record)
    assert set(rows(winners.from_log(record, SIZES)).values()) == {8}


# -- the table


def _tuned(tmp_path, monkeypatch, twin, us=smaller_is_faster, identity=IDENTITY):
    monkeypatch.setattr(tune_command.environment, "twin_identity", lambda twin: {"triton": identity["triton"]})
    one = job(twin)
    record = tune_command.open_log(tmp_path / "log", one, H200)
    tune(one, lab(FakeClock(us), static_shapes=twin == "pallas"), record)
    path = tune_command.write(one, H200, tmp_path / "log", tmp_path / "tables")
    assert path is not None
    return read_table(path, OP.spec, STATICS), path


def test_both_twins_in_one_table(tmp_path, monkeypatch):
    _tuned(tmp_path, monkeypatch, "triton", lambda size, rows: 10 + abs(rows - 8))
    table, path = _tuned(tmp_path, monkeypatch, "pallas", lambda size, rows: 10 + rows)
    assert path.name == "headdim=16,dstate=16,device_name=NVIDIA_H200,cache_dtype=float32.json"
    entry = table.nearest(256)
    assert entry.shared == {"BLOCK_SIZE_M": 8, "num_warps": 4}
    assert entry.own == {"pallas": {"BLOCK_SIZE_M": 4, "tiles_per_block": 1, "use_tma": False}}
    assert entry.tuned_at == {"B": 2, "H": 128}
    assert table.metadata["measured_us"]["256"] == {"triton": 10.0, "pallas": 14.0}
    assert table.metadata["source"] == "tuned by twin-ssm"
    assert {"triton_version", "jax_version", "torch_version", "driver", "date", "command"} <= table.metadata.keys()


def test_pallas_needs_no_object_where_the_rule_already_says_it(tmp_path, monkeypatch):
    _tuned(tmp_path, monkeypatch, "triton")  # 4 rows by 4 warps: the rule gives 4 rows a warpgroup
    table, _ = _tuned(tmp_path, monkeypatch, "pallas")
    assert all(not entry.own for entry in table.entries)
    assert table.metadata["measured_us"]["8"].keys() == {"triton", "pallas"}


def test_one_twin_alone_keeps_what_the_other_was_measured_to_want(tmp_path, monkeypatch):
    _tuned(tmp_path, monkeypatch, "triton")
    _tuned(tmp_path, monkeypatch, "pallas")  # what the rule gives, so no object
    newer = IDENTITY | {"triton": "3.7.0"}  # neither log counts any more, the table still does
    table, _ = _tuned(tmp_path, monkeypatch, "triton", lambda size, rows: 10 + abs(rows - 8), newer)
    entry = table.nearest(8)
    assert entry.shared == {"BLOCK_SIZE_M": 8, "num_warps": 4}
    assert entry.own == {"pallas": {"BLOCK_SIZE_M": 4, "tiles_per_block": 1, "use_tma": False}}
    assert table.metadata["measured_us"]["8"] == {"triton": 10.0, "pallas": 14.0}


def test_pallas_alone_takes_the_shared_knobs_from_the_heuristic(tmp_path, monkeypatch):
    table, _ = _tuned(tmp_path, monkeypatch, "pallas")
    entry = table.nearest(8)
    assert entry.shared == OP.spec.heuristic(STATICS, "float32", H200, 8)
    assert entry.own["pallas"]["BLOCK_SIZE_M"] == 4


def test_an_unfinished_job_leaves_the_table_alone(tmp_path, monkeypatch):
    _, path = _tuned(tmp_path, monkeypatch, "triton")
    before = path.read_bytes()
    monkeypatch.setattr(tune_command.environment, "twin_identity", lambda twin: {"triton": "3.7.0"})
    assert tune_command.write(job(), H200, tmp_path / "log", tmp_path / "tables") is None
    assert path.read_bytes() == before


def test_sizes_outside_this_run_stay(tmp_path, monkeypatch):
    _, path = _tuned(tmp_path, monkeypatch, "triton")
    part = {"triton": {16: tables.Winner(config_of({"BLOCK_SIZE_M": 16, "num_warps": 4}), 5.0)}}
    tables.update(
        path, OP.spec, STATICS, H200, "float32", winners=part, tuned_at={16: {"B": 1, "H": 16}}, metadata={"date": "x"}
    )
    table = read_table(path, OP.spec, STATICS)
    assert [entry.size for entry in table.entries] == list(SIZES)
    assert [entry.shared["BLOCK_SIZE_M"] for entry in table.entries] == [4, 16, 4, 4]


def test_tune_from_end_to_end(tmp_path, monkeypatch, capsys, interpret):
    """The command on our real Triton twin; everything but clock and device is what a GPU would run."""
    if not interpret:
        pytest.skip("runs the interpreters")

    class CountingClock(FakeClock):
        def cold_us(self, calls, repeats):
            for call in calls:
                call.issue()
            return [Sample(float(10 + i), 9.0, 20.0, ("kernel",)) for i, _ in enumerate(calls)]

    machine = Machine(CPU, H200, CountingClock(None))
    arguments = command.parser().parse_args(
        ["tune", OP.name, "--headdim", "16", "--dstate", "16", "--cache-dtype", "float16", "--twin", "triton", "--sizes",
         "8", "16", "--tables", str(tmp_path / "tables"), "--log", str(tmp_path / "log")]
    )  # fmt: skip
    assert tune_command.run(OP, arguments, machine) == 0
    assert "1 jobs on NVIDIA H200, about" in capsys.readouterr().out
    (path,) = (tmp_path / "tables" / OP.name).iterdir()
    table = read_table(path, OP.spec, STATICS)
    assert [entry.size for entry in table.entries] == [8, 16]
    assert table.entries[0].shared == CANDIDATES["triton"][0]
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(tmp_path / "tables"))
    found = lookup(OP.name, twin="triton", device=H200, dtype="bfloat16", size=9, **STATICS)
    assert (found.source, found.key, found.knobs) == ("SSM_TUNED_CONFIG_FOLDER", 8, CANDIDATES["triton"][0])
