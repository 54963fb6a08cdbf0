"""The declarations of the chunked operators' stages: bytes, shapes behind keys, the float64 references against the oracle."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gate, host_command, results, run_command, start_command, tune_command
from benchmarks.implementations import OWN, JaxTwin, TritonTwin
from benchmarks.lab import Lab
from benchmarks.machine import Machine
from benchmarks.op import BenchOp, Storage, Sweep, draw
from benchmarks.ops import OPS, STAGES
from benchmarks.report import page, sources
from benchmarks.results import Row
from benchmarks.timing import Sample
from ssm_configs import Device, read_table
from ssm_configs.spec import check_knobs

from .cases import Case, select
from .oracle import gdn, ssd
from .test_benchmarks_tune import FakeClock

NEW = [OPS[name] for name in STAGES if name != "gdn_chunk_o"]
ALL = pytest.mark.parametrize("op", NEW, ids=lambda op: op.name)
EACH = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
CPU = torch.device("cpu")
H200 = Device("NVIDIA H200", (9, 0))
NO_CLOCK = FakeClock(lambda size, rows: 0, sessions=0)
SSD = {"B": 1, "T": 24, "H": 2, "G": 1, "P": 16, "N": 16, "L": 16}
GDN = {"B": 1, "T": 24, "H_k": 1, "H_v": 2, "K": 16, "V": 32, "L": 16}


def small(op: BenchOp, packed: bool) -> Case:
    """Short last chunks; two batch rows, or packed sequences, an empty one among them."""
    ours = op.name.startswith("ssd_")
    options: dict[str, Any] = {"lengths": (1, 0, 19, 4), "initial": True} if packed else {}
    dims = {**(SSD if ours else GDN), "B": 1 if packed else 2}
    options |= {"D": True} if ours else {}
    return Case(op.operator, "packed" if packed else "dense", dims, op.run_dtypes[0], options=options)


def by_oracle(op: BenchOp, tensors, scalars) -> dict[str, torch.Tensor]:
    arrays = {
        name: (tensor.double() if tensor.is_floating_point() else tensor).numpy() for name, tensor in tensors.items()
    }
    positional = [arrays.pop(name) for name in op.positional]
    function = getattr(ssd if op.name.startswith("ssd_") else gdn, op.operator.partition(".")[2])
    returned = function(*positional, **arrays, **scalars)
    returned = returned if isinstance(returned, tuple) else (returned,)
    return {name: torch.from_numpy(made) for name, made in zip((op.result, *op.fresh), returned, strict=True)}


# -- shapes, bytes, candidates


def at(name: str, sweep: str = "") -> Case:
    op = OPS[name]
    return op.sweeps[sweep or next(iter(op.sweeps))].case(8192, op.run_dtypes[0])


def test_bytes_and_flops_by_hand():
    T, H, P, N, chunks = 8192, 128, 64, 128, 64
    step, state = 2 * 4 * H * T, 4 * H * P * N * chunks  # dt and dA_cumsum; the states of all chunks
    moved = {
        "ssd_chunk_cumsum": 2 * T * H + 8 * H + step,
        "ssd_chunk_state": 2 * T * (H * P + 8 * N) + step + state,
        "ssd_state_passing": 2 * state + 4 * H * chunks + 4 * H * P * N,
        "ssd_bmm_chunk": 2 * 2 * T * 8 * N + 4 * T * 8 * 128,
        "ssd_chunk_scan": 4 * T * H * P + 2 * T * 8 * N + step + state + 4 * 8 * chunks * (128 * 129 // 2) + 4 * H,
        "gdn_chunk_local_cumsum": 2 * 4 * T * 32,
        "gdn_chunk_scaled_dot_kkt": T * (2 * 16 * 128 + 2 * 4 * 32 + 4 * 32 * 64),
        "gdn_solve_tril": 4 * T * 32 * (31 + 64),
        "gdn_recompute_w_u": T * (2 * 16 * 128 + 2 * 32 * (3 * 128 + 32) + 2 * 4 * 32),
        "gdn_chunk_delta_h": T * (2 * 16 * 128 + 2 * 32 * 3 * 128 + 4 * 32) + 32 * 128 * 128 * (2 * 128 + 4),
    }
    assert {name: OPS[name].bytes_moved(at(name)) for name in moved} == moved
    # causal, in chunks of 256 tokens: the products with x and those with the state
    assert OPS["ssd_chunk_scan"].flops(at("ssd_chunk_scan", "H80")) == T * 80 * 64 * (256 + 2 * 128)


@ALL
def test_every_tuned_key_has_a_shape(op):
    statics = {key: values[0] for key, values in op.grid.items()}
    assert op.grid.keys() == set(op.spec.static_keys)
    for dtype in op.tuned_dtypes or ():
        for size in op.sizes:
            case = op.case(size, statics, dtype)
            assert op.table_key(case) == (size, statics)
            assert op.spec.table_dtype(op.dtype_of(case)) == dtype and {case.dims[key] for key in op.spec.tuned_at}
            assert op.table_key(op.single(case))[1] == statics


@ALL
def test_a_key_without_a_shape_is_an_error(op):
    if op.name == "ssd_chunk_cumsum":
        pytest.skip("any number of tokens is a shape")
    statics = {key: values[0] for key, values in op.grid.items()}
    with pytest.raises(ValueError, match=r"size: expected .* got 33"):
        op.case(33, statics, next(iter(op.tuned_dtypes or ())))


@ALL
def test_candidates_are_legal_and_few_the_rule_first(op):
    statics = {key: values[-1] for key, values in op.grid.items()}
    for dtype in op.spec.dtypes:
        candidates = op.candidates("triton", statics, dtype)
        assert 4 <= len(candidates) <= 40
        assert len({tuple(knobs.items()) for knobs in candidates}) == len(candidates)
        assert candidates[0] == op.spec.heuristic(statics, dtype, H200, 1)
        for knobs in candidates:
            check_knobs(op.spec.triton_knobs, knobs, statics)


def test_what_pallas_has_is_what_is_declared():
    from pallas_ssm.gdn._vjp import KERNELS

    for name in STAGES:
        has_kernel = name.startswith("ssd_") or name.removeprefix("gdn_") in KERNELS
        assert ("mosaic_gpu" in OPS[name].own) == has_kernel


@ALL
def test_what_cannot_be_drawn_is_an_error(op):
    case = small(op, packed=False)
    with pytest.raises(ValueError, match="tail cannot be benchmarked"):
        op.operands(Case(case.op, "tail", case.dims, case.dtype, options={"tail": 3}))
    for case in select(op=op.operator, tags=("standard",)):
        assert op.operands(case) and op.bytes_moved(case) > 0


# -- the reference and the twins


@ALL
@EACH
def test_the_reference_on_the_device_is_the_oracle(op, packed):
    case = small(op, packed)
    tensors = draw(op, case, Storage(CPU))
    found_by = by_oracle(op, tensors, op.scalars(case))
    found = gate.errors(op, case, tensors, found_by)
    assert found.keys() == {op.result, *op.fresh}
    assert all(error.relative < 1e-12 for error in found.values()), found
    # Every result is looked at, to its last element that means something.
    for name, result in found_by.items():
        wrong = {**found_by, name: result.clone()}
        elements = wrong[name].view(-1)
        elements[int(elements.isfinite().nonzero()[-1])] += 1 + 9 * float(elements.nan_to_num().abs().max())
        assert gate.verdict(op, case, gate.errors(op, case, tensors, wrong)) is not None, name


@ALL
@EACH
@pytest.mark.parametrize("implementation", [TritonTwin(CPU), JaxTwin("xla")], ids=["triton", "xla"])
@pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")
def test_the_packages_pass_the_gate(op, packed, implementation, interpret):
    if not interpret:
        pytest.skip("runs the interpreters")
    lab = Lab(op, implementation, NO_CLOCK, Storage(CPU))
    for _ in range(2):  # a second check starts from fresh operands
        wrong, errors = lab.check(small(op, packed), None)
        assert wrong is None
        assert errors.keys() == {op.result, *op.fresh}


# -- the commands


def test_host_and_start_know_stages():
    machine = Machine(CPU, H200, None)  # type: ignore[arg-type]
    op = OPS["gdn_chunk_local_cumsum"]
    for name in op.own[1:]:
        row = host_command.measure(op, small(op, False), OWN[name](CPU), machine, calls=10)
        assert row.op == op.name and row.us > 0
    assert start_command.case_of(op) == select(op=op.operator, tags=("standard",))[0]
    arguments = command.parser().parse_args(["start", op.name])
    start_command.validate(arguments)
    assert arguments.ops == [op.name]


def test_run_stages_from_end_to_end(tmp_path, monkeypatch, interpret):
    if not interpret:
        pytest.skip("runs the interpreters")
    op = OPS["gdn_chunk_local_cumsum"]
    sweep = Sweep((16,), lambda T, dtype: replace(small(op, False), name=f"T={T}"))
    monkeypatch.setitem(run_command.OPS, op.name, replace(op, sweeps={"T": sweep}))
    monkeypatch.setattr(run_command, "COPY_SIZES", (1 << 12,))
    monkeypatch.setattr(run_command, "host_us", lambda call: 1.0)
    monkeypatch.setattr(run_command, "this_machine", lambda clock: Machine(CPU, H200, Stopping(9)))
    assert command.main(["run", "stages", op.name, "--no-cases", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{op.name}.json"]  # and no curves of so few points
    _, rows = results.read(tmp_path / f"{op.name}.json")
    assert [row.implementation for row in rows] == [results.CEILING, "triton", "xla"]
    assert all(row.error is not None and row.bytes == op.bytes_moved(small(op, False)) for row in rows[1:])


class Stopping:
    """A clock that gets the tuner stopped in the session after `sessions`."""

    def __init__(self, sessions: int):
        self.sessions = sessions

    def supports(self, framework):
        return True

    def cold_us(self, calls, repeats):
        if not self.sessions:
            raise SystemExit(143)
        self.sessions -= 1
        for call in calls:
            call.issue()
        return [Sample(10.0 + i, 9.0, 20.0, ("kernel",)) for i, _ in enumerate(calls)]


def tuned(monkeypatch, tmp_path, sessions: int, *more: str):
    folders = ["--tables", str(tmp_path / "tables"), "--log", str(tmp_path / "log")]
    monkeypatch.setattr(tune_command, "this_machine", lambda clock: Machine(CPU, H200, Stopping(sessions)))
    return command.main(["tune", "stages", "gdn_chunk_local_cumsum", *folders, *more])


def table(tmp_path):
    (path,) = (tmp_path / "tables" / "gdn_chunk_local_cumsum").iterdir()
    return read_table(path, OPS["gdn_chunk_local_cumsum"].spec, {"chunk_size": 16})


@pytest.fixture
def tiny(monkeypatch, interpret):
    """A stage with two sizes, one and two chunks of 16 tokens of 32 heads."""
    if not interpret:
        pytest.skip("runs the interpreters")
    op = replace(
        OPS["gdn_chunk_local_cumsum"], sizes=(512, 1024), first_sizes=(512, 1024), grid={"chunk_size": (16,)},
        candidates=lambda *asked: [{"BLOCK_SIZE_H": 8, "num_warps": warps} for warps in (2, 1, 4, 8)],
    )  # fmt: skip
    monkeypatch.setitem(tune_command.OPS, op.name, op)
    return op


def test_tune_stages_from_end_to_end(tmp_path, tiny, monkeypatch, capsys):
    assert tuned(monkeypatch, tmp_path, 9) == 0
    said = capsys.readouterr().out
    assert "gdn_chunk_local_cumsum: nothing to tune for pallas: XLA alone runs it" in said
    made = table(tmp_path)
    assert [entry.size for entry in made.entries] == [512, 1024] and "unfinished" not in made.metadata
    assert made.entries[0].shared == tiny.spec.heuristic({"chunk_size": 16}, "float32", H200, 512)


def test_a_stopped_tuner_writes_what_it_knows_and_goes_on_from_there(tmp_path, tiny, monkeypatch):
    with pytest.raises(SystemExit):
        tuned(monkeypatch, tmp_path, 1)
    made = table(tmp_path)
    assert [entry.size for entry in made.entries] == [1024]  # the largest comes first
    assert made.metadata["unfinished"] == {"triton": "4 of 4 configs, 1 of 2 sizes"}
    assert tuned(monkeypatch, tmp_path, 1) == 0
    assert [entry.size for entry in table(tmp_path).entries] == [512, 1024]
    assert "unfinished" not in table(tmp_path).metadata


def test_a_limit_leaves_out_candidates_and_says_so(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("benchmarks.tune._BATCH", 3)
    assert tuned(monkeypatch, tmp_path, 9, "--limit-s", "1e-9") == 0
    assert table(tmp_path).metadata["unfinished"] == {"triton": "3 of 4 configs, 2 of 2 sizes"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stages", "ssd_scan"], "op: expected some of ssd_chunk_cumsum, .* got ssd_scan"),
        (["stages", "--limit-s", "0"], "--limit-s: expected a positive number of seconds, got 0"),
        (["gdn_chunk_local_cumsum", "--dtype", "float16"], "dtype: expected float32, .* got float16"),
    ],
)
def test_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        tune_command.validate(command.parser().parse_args(["tune", *arguments]))


def test_the_report_puts_stages_under_their_operator(tmp_path):
    folder = tmp_path / "NVIDIA_H200"
    for name in ("mamba_chunk_scan_combined", "ssd_chunk_state", "ssd_bmm_chunk", "gdn_solve_tril"):
        op = OPS[name]
        case = next(iter(op.sweeps.values())).case(8192, op.run_dtypes[0])
        rows = [
            Row(case=case.name, dims=results.dims_of(op, case), implementation=one, us=10.0, bytes=10**6, host_us=9.0)
            for one in op.own
        ]
        results.write(
            folder / f"{name}.json", name, "NVIDIA_H200", {"torch": "2.11.0"}, "python -m benchmarks run", rows
        )
    made = page.sections(sources.load(folder))
    titles = [section.title for section in made]
    assert titles[:4] == [
        "At a glance", "mamba_chunk_scan_combined", "mamba_chunk_scan_combined, its stages",
        "chunk_gated_delta_rule, its stages",
    ]  # fmt: skip
    assert not made[2].pictures and not any("ssd_" in title for title in titles)
    assert [paragraph.partition(":")[0] for paragraph in made[2].paragraphs] == ["ssd_chunk_state", "ssd_bmm_chunk"]
    assert sum(not block.folded for block in made[2].blocks) == 2  # type: ignore[union-attr]
