"""The result file, the figures drawn from it, the peers, and the command line."""

import dataclasses
import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import peers, plot, results, run_command
from benchmarks.machine import Machine
from benchmarks.op import Sweep
from benchmarks.ops import OPS
from benchmarks.results import CEILING, Row
from benchmarks.timing import Sample
from benchmarks.tune_command import jobs_of
from ssm_configs import Device

from .cases import select

OP = OPS["selective_state_update"]
STATICS = {"headdim": 64, "dstate": 128}
KEYS = {
    "case", "dims", "implementation", "us", "us_p20", "us_p80", "host_us", "bytes", "flops", "floor_us", "error", "config",
    "kernels", "source",
}  # fmt: skip


def rows():
    copy = Row(case="copy 1024 MiB", dims={"bytes": 2**30}, implementation=CEILING, us=500.0, bytes=2**31)
    made = [copy]
    for size, dtype, implementation, us in [
        (1024, "float32", "triton", 20.0), (1024, "float32", "mosaic_gpu", 21.0), (8192, "float32", "triton", 140.0),
        (8192, "float16", "triton", 70.0), (8192, "float16", "peer:vllm", 75.0),
    ]:  # fmt: skip
        case = OP.case(size, STATICS, dtype)
        made.append(
            Row(
                case=case.name, dims=results.dims_of(OP, case), implementation=implementation, us=us, us_p20=us - 1,
                us_p80=us + 1, host_us=30.0, bytes=OP.bytes_moved(case), flops=OP.flops(case), error=1e-3,
                config={"BLOCK_SIZE_M": 4, "num_warps": 1, "source": "shipped"}, kernels=["kernel", "Memcpy <DtoD>"],
            )
        )  # fmt: skip
    results.set_floors(made)
    return made


def write(path, made):
    results.write(path, OP.name, "NVIDIA_H200", {"torch": "2.11.0", "driver": "580"}, "python -m benchmarks run", made)


def test_the_schema(tmp_path):
    path = tmp_path / "new" / "selective_state_update.json"
    write(path, rows())
    data = json.loads(path.read_text())
    assert data.keys() == {"op", "device", "runs"}
    (run,) = data["runs"]
    assert run.keys() == {"versions", "date", "command", "rows"}
    assert all(row.keys() == KEYS for row in run["rows"])
    row = run["rows"][1]
    assert row["dims"] == {
        "S": 8, "B": 8, "H": 128, "G": 8, "P": 64, "N": 128, "dtype": "bfloat16", "state_dtype": "float32",
    }  # fmt: skip
    assert (row["case"], row["implementation"], row["source"]) == ("E=1024", "triton", "measured")
    head, read = results.read(path)
    assert head["device"] == "NVIDIA_H200" and [one.us for one in read] == [one.us for one in rows()]
    assert list(path.parent.iterdir()) == [path]


def test_a_run_takes_the_place_of_what_it_measures_again(tmp_path):
    path = tmp_path / "selective_state_update.json"
    write(path, rows())
    again = [dataclasses.replace(row, us=7.0) for row in rows()[1:2]]
    results.write(path, OP.name, "NVIDIA_H200", {"torch": "2.12.0"}, "python -m benchmarks run again", again)
    head, read = results.read(path)
    assert head["versions"] == {"torch": "2.12.0", "driver": "580"} and head["command"].endswith(
        "run; python -m benchmarks run again"
    )
    assert [row.us for row in read] == [row.us for i, row in enumerate(rows()) if i != 1] + [7.0]
    with pytest.raises(ValueError, match="expected results of NVIDIA_B200, got NVIDIA_H200"):
        results.write(path, OP.name, "NVIDIA_B200", {}, "", again)


def test_the_floor_is_the_bytes_at_the_fastest_copy():
    made = [Row(case="c", dims={}, implementation=CEILING, us=us, bytes=4_000) for us in (2.0, 1.0)]
    made.append(Row(case="x", dims={}, implementation="triton", us=5.0, bytes=8_000))
    results.set_floors(made)
    assert [row.floor_us for row in made] == [None, None, 2.0]
    assert made[2].gbps == pytest.approx(1.6)


def test_a_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path / "x.json", [Row(case="c", dims={}, implementation="triton", us=float("nan"), bytes=1)])
    assert not (tmp_path / "x.json").exists()


def test_figures_from_the_file_alone(tmp_path):
    path = tmp_path / "selective_state_update.json"
    write(path, rows())
    written = plot.draw(path)
    assert [one.name for one in written] == ["selective_state_update.float32.png", "selective_state_update.float16.png"]
    assert all(one.read_bytes().startswith(b"\x89PNG") for one in written)


def test_quoted_rows_stand_in_for_missing_peers_only(tmp_path):
    figures = tmp_path / "peers.jsonl"
    shape = {"op": "ssu", "B": 8, "H": 128, "G": 8}
    lines = [
        {"op": "copy", "gbps": 4273.0},
        shape | {"peer": "vllm", "dtype": "torch.float32", "ms": 0.0473, "graph_ms": 0.01547},
        shape | {"peer": "mamba_ssm", "dtype": "torch.float32", "ms": 0.0361, "graph_ms": 0.02336},
        shape | {"peer": "vllm", "dtype": "torch.float16", "ms": 0.04883, "graph_ms": 0.01141},
        shape | {"peer": "vllm", "B": 64, "dtype": "torch.float32", "ms": 0.147, "graph_ms": 0.144},
    ]
    figures.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    other = OP.case(1024, {"headdim": 80, "dstate": 128}, "float32")  # not what the figures were taken at
    (row,) = results.quoted(OP, [OP.case(1024, STATICS, "float32"), other], figures, ["vllm"])
    assert (row.implementation, row.us, row.source) == ("peer:vllm", pytest.approx(15.47), "quoted")
    assert row.us_p20 is None and row.error is None


def test_missing_peers_are_named_with_the_reason():
    absent = peers.Peer("nobody", "no_such_module.ops", "f", lambda *_: lambda: torch.empty(0))
    renamed = peers.Peer("renamed", "json", "no_such_function", lambda *_: lambda: torch.empty(0))
    here = peers.Peer("here", "json", "dumps", lambda *_: lambda: torch.empty(0))
    present, missing = peers.find((absent, renamed, here))
    assert present == {here: json.dumps} and here.version() != ""
    assert missing[absent] == "ModuleNotFoundError: No module named 'no_such_module'"
    assert missing[renamed] == "ImportError: json has no no_such_function"


@pytest.mark.parametrize("peer", OP.peers, ids=lambda peer: peer.name)
def test_peers_are_called_on_their_tied_path(peer):
    from benchmarks.op import Storage, draw

    case = OP.case(16, {"headdim": 8, "dstate": 4}, "float32")
    tensors = draw(OP, case, Storage(torch.device("cpu")))
    seen = {}

    def function(state, x, dt, A, B, C, D=None, dt_bias=None, **keywords):
        seen.update(dt=dt, A=A, D=D, dt_bias=dt_bias, **keywords)
        return x

    peer.adapt(function, tensors, torch.empty_like(tensors["x"]))()
    assert seen["A"].shape == (16, 8, 4) and seen["A"].stride()[1:] == (0, 0)
    assert seen["dt"].shape == (1, 16, 8) and seen["dt"].stride(-1) == 0
    assert seen["dt_bias"].shape == (16, 8) and seen["dt_bias"].stride(-1) == 0
    assert seen["dt_softplus"] is True and seen["state_batch_indices"].dtype == torch.int32


# -- measuring, with implementations of which one is wrong


class FakeClock:
    def supports(self, framework):
        return True

    def cold_us(self, calls, repeats):
        return [Sample(10.0 + i, 9.0, 20.0, ("kernel",)) for i, _ in enumerate(calls)]


def machine():
    return Machine(torch.device("cpu"), Device("NVIDIA H200", (9, 0)), FakeClock())


def test_a_wrong_implementation_is_not_timed():
    from .test_benchmarks_tune import Definition

    class Named(Definition):
        def __init__(self, name, **definition):
            super().__init__(**definition)
            self.name = name

        def bind(self, op, operands, compiled, knobs):
            return dataclasses.replace(super().bind(op, operands, compiled, knobs), label=self.name)

    def spoil(size, knobs, results):
        results["state"][0] = 0

    cases = [OP.case(16, {"headdim": 8, "dstate": 16}, "float32")]
    implementations = {"triton": Named("triton"), "peer:wrong": Named("peer:wrong", spoil=spoil)}
    made, failures = [], []
    run_command.measure(OP, cases, implementations, machine(), made, failures)
    assert [row.implementation for row in made] == ["triton"]
    assert made[0].us == 10.0 and made[0].error < 2e-3 and made[0].config["source"] == "heuristic"
    assert len(failures) == 1 and failures[0].startswith("peer:wrong: E=16") and "state: relative error" in failures[0]


def test_run_from_end_to_end(tmp_path, monkeypatch, capsys, interpret):
    if not interpret:
        pytest.skip("runs the interpreters")
    monkeypatch.setattr(run_command, "COPY_SIZES", (1 << 12,))
    monkeypatch.setattr(run_command, "select", lambda **_: [])
    monkeypatch.setattr(run_command, "host_us", lambda call: 1.0)  # a hundred calls in an interpreter take their time
    sweep = Sweep((8, 16), lambda size, dtype: OP.case(size, {"headdim": 16, "dstate": 16}, dtype))
    op = dataclasses.replace(OP, sweeps={"E": sweep})
    chosen = ["--implementations", "triton", "xla", "peer:vllm", "--dtypes", "float16"]
    arguments = command.parser().parse_args(["run", OP.name, "--out", str(tmp_path), *chosen])
    assert run_command.run(op, arguments, machine()) == 0
    assert "peer:vllm is missing: ModuleNotFoundError" in capsys.readouterr().out
    head, made = results.read(tmp_path / f"{OP.name}.json")
    assert head["device"] == "NVIDIA_H200" and {"torch", "triton", "jax", "driver"} <= head["versions"].keys()
    assert [(row.case, row.implementation) for row in made] == [
        ("copy 0 MiB", CEILING), ("E=16", "triton"), ("E=16", "xla"), ("E=8", "triton"), ("E=8", "xla"),
    ]  # fmt: skip
    assert all(row.error is not None and row.error < 3e-3 for row in made[1:])
    assert all(row.host_us and row.floor_us for row in made[1:])
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}


def test_without_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for verb in ("run", "tune"):
        with pytest.raises(SystemExit, match="no CUDA device"):
            command.main([verb, OP.name])


def test_the_sweep_and_the_models_shapes():
    assert [case.name for case in run_command.sweep(OP, ["E"], [8, 16], ["float16"])] == ["E=16", "E=8"]
    for case in select(op=OP.name, tags=("standard",)):
        assert OP.bytes_moved(case) > 0 and OP.operands(case)["state"].shape[0] == case.dims["S"]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_case_that_run_measures_is_declared_in_full(op):
    cases = run_command.sweep(op, list(op.sweeps), None, op.run_dtypes)
    for case in (*cases, *select(op=op.operator, tags=("standard",))):
        assert op.bytes_moved(case) > 0 and op.flops(case) > 0
        assert {*op.positional, op.output} - {None} <= op.operands(case).keys()
        assert op.spec.table_dtype(op.dtype_of(case)) in op.spec.dtypes
        op.spec.check_statics(op.table_key(case)[1])


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_sweep_is_a_figure_and_every_point_on_it(op):
    cases = run_command.sweep(op, list(op.sweeps), None, op.run_dtypes)
    made = [
        Row(case=case.name, dims=results.dims_of(op, case), implementation="triton", us=1.0, bytes=1) for case in cases
    ]
    points = plot.points_of(made)
    assert len(points) == len(cases)
    assert len({point.figure for point in points}) == len(op.sweeps) * len(op.run_dtypes)
    assert len({plot.title_of({"op": op.name, "device": "D"}, point) for point in points}) == len(
        {point.figure for point in points}
    )
    assert len({(point.figure, point.size) for point in points}) == len(points)


def test_a_sweep_with_a_name_has_a_figure_of_its_own(tmp_path):
    made = []
    for line in ("one sequence, D=64", "dense, D=64"):
        dims = {"B": 1, "T": 256, "D": 64, "W": 4, "dtype": "bfloat16"}
        made.append(Row(case=f"{line}: T=256", dims=dims, implementation="triton", us=1.0, bytes=10))
    path = tmp_path / "causal_conv1d.json"
    results.write(path, "causal_conv1d", "NVIDIA_H200", {"torch": "2.11.0"}, "python -m benchmarks run", made)
    assert [one.name for one in plot.draw(path)] == [
        "causal_conv1d.bfloat16.one-sequence-D-64.png", "causal_conv1d.bfloat16.dense-D-64.png",
    ]  # fmt: skip


# -- the command line


@pytest.mark.parametrize(
    "arguments", [[], ["run"], ["tune"], ["plot"], *([verb, name] for verb in ("run", "tune") for name in OPS)]
)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main([*arguments, "--help"])
    assert exit.value.code == 0
    assert "usage: python -m benchmarks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: run|tune|plot"),
        (["fly"], "invalid choice: 'fly'"),
        (["run", "no_such_op"], "invalid choice: 'no_such_op'"),
        (["run", OP.name, "--clock", "sundial"], "invalid choice: 'sundial'"),
        (["tune", OP.name, "--twin", "third"], "invalid choice: 'third'"),
        (["tune", OP.name, "--cache-dtype", "bfloat16"], "invalid choice: 'bfloat16'"),
        (["tune", OP.name, "--headdim", "wide"], "invalid int value: 'wide'"),
        (["tune", OP.name, "--clock", "events"], "cannot time JAX: add --twin triton"),
        (["tune", OP.name, "--sizes", "200"], "multiple of 128, got 200"),
        (["run", OP.name, "--sizes", "200"], "multiple of 128, got 200"),
        (["run", OP.name, "--dtypes", "float8"], "invalid choice: 'float8'"),
        (["run", OP.name, "--implementations", "cuda"], "invalid choice: 'cuda'"),
        (["run", OP.name, "--sweeps", "T"], "invalid choice: 'T'"),
        (["tune", "causal_conv1d", "--sizes", "1000"], "multiple of 10240, 5376, 8192 channels, got 1000"),
        (["plot", "no/such/file.json"], "no/such/file.json"),
    ],
)
def test_argument_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_the_default_jobs_are_the_grid_largest_state_first():
    jobs = jobs_of(OP, command.parser().parse_args(["tune", OP.name]))
    assert len(jobs) == 3 * 4 * 2 * 2 and len({str(job) for job in jobs}) == len(jobs)
    assert [str(job) for job in jobs[:2]] == [
        "headdim=128,dstate=256,cache_dtype=float32 triton", "headdim=128,dstate=256,cache_dtype=float32 pallas",
    ]  # fmt: skip
    assert jobs[0].sizes == OP.sizes and len(OP.sizes) == 21
