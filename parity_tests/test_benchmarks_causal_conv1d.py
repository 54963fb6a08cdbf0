"""The declarations of the convolutions: bytes, shapes behind keys, the float64 reference against the oracle, the commands."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gate, results, run_command, tune_command
from benchmarks.implementations import JaxTwin, TorchOperands, TritonTwin
from benchmarks.lab import Lab
from benchmarks.machine import Machine
from benchmarks.op import Storage, Sweep, draw
from benchmarks.ops import OPS, _causal_conv1d
from benchmarks.timing import Sample
from ssm_configs import Device, read_table
from ssm_configs.spec import check_knobs

from . import oracle
from .cases import Case
from .test_benchmarks_tune import FakeClock
from .tolerances import tolerance

PREFILL, UPDATE = OPS["causal_conv1d"], OPS["causal_conv1d_update"]
BOTH = pytest.mark.parametrize("op", [PREFILL, UPDATE], ids=lambda op: op.name)
CPU = torch.device("cpu")
NO_CLOCK = FakeClock(lambda size, rows: 0, sessions=0)
MODEL = {"bias": True, "activation": "silu"}


def prefill(name, dtype="bfloat16", B=1, T=24, W=4, **options):
    return Case(PREFILL.name, name, {"B": B, "T": T, "D": 64, "W": W}, dtype, dtype, MODEL | options)


def update(name, dtype="bfloat16", B=3, L=3, W=4):
    return Case(UPDATE.name, name, {"S": B + 3, "L": L, "B": B, "D": 64, "W": W}, dtype, dtype, MODEL | {"slots": True})


CASES = [
    prefill("one sequence, pool", lengths=(24,), pool=True),
    prefill("four sequences, pool", lengths=(11, 0, 1, 12), pool=True),
    prefill("four sequences, fp32 pool", "float32", lengths=(2, 9, 0, 13), pool=True),
    prefill("packed, no state", lengths=(5, 19)),
    prefill("packed, initial states", lengths=(0, 24), initial=True),
    prefill("dense", B=2),
    prefill("dense, initial states, width 2", B=2, W=2, initial=True),
    prefill("two tokens", T=2),
    update("update"),
    update("update, width 2", "float32", L=1, W=2),
    update("update, spare rows", L=6),
]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def oracle_results(op, tensors):
    """y and the state by the NumPy definition, in float64."""
    arrays = {
        name: (tensor.double() if tensor.is_floating_point() else tensor).numpy() for name, tensor in tensors.items()
    }
    positional = [arrays.pop(name) for name in op.positional]
    y, state = getattr(oracle, op.name)(*positional, **arrays, **op.scalars(None))
    return {"y": torch.from_numpy(y), op.after_y(tensors)[0]: torch.from_numpy(np.asarray(state, np.float64))}


def stored(op, tensors):
    """The same as an implementation would store it."""
    return {name: result.to(tensors["x"].dtype) for name, result in oracle_results(op, tensors).items()}


def op_of(case):
    return OPS[case.op]


# -- shapes, bytes, candidates


def test_bytes_by_hand():
    # T=8192 D=10240: 335,544,320 bytes of x and y; states in and out, four taps, a bias, two bounds, a slot, a flag
    case = PREFILL.case(8192 * 10240, {"width": 4}, "float16")
    assert PREFILL.bytes_moved(case) == 335_544_320 + 2 * 3 * 20480 + 5 * 20480 + 2 * 4 + 4 + 1
    assert PREFILL.flops(case) == 8192 * 10240 * (2 * 4 + 4)
    # a sequence: x, y, three rows in and three out
    case = UPDATE.case(256 * 10240, {"width": 4}, "float16")
    assert UPDATE.bytes_moved(case) == 256 * 8 * 20480 + 5 * 20480 + 256 * 4


def test_the_training_forward_reads_no_state_and_writes_one():
    case = PREFILL.sweeps["dense-T"].case(8192, "bfloat16")
    assert PREFILL.bytes_moved(case) == 335_544_320 + 3 * 20480 + 5 * 20480
    assert PREFILL.operands(case).keys() == {"x", "weight", "bias"}


@pytest.mark.parametrize(
    ("size", "T", "D"),
    [(83_886_080, 8192, 10240), (44_040_192, 8192, 5376), (1 << 18, 32, 8192), (1 << 30, 131072, 8192)],
)
def test_the_shape_behind_a_key_divides_it_exactly(size, T, D):
    case = PREFILL.case(size, {"width": 4}, "float16")
    assert (case.dims["T"], case.dims["D"], case.dtype, case.options["lengths"]) == (T, D, "bfloat16", (T,))
    assert size in PREFILL.sizes and PREFILL.table_key(case) == (size, {"width": 4})


@BOTH
def test_every_tuned_key_has_a_shape(op):
    for dtype, x_dtype in (("float16", "bfloat16"), ("float32", "float32")):
        for size in op.sizes:
            case = op.case(size, {"width": 3}, dtype)
            assert op.table_key(case) == (size, {"width": 3}) and op.dtype_of(case) == x_dtype
            assert {case.dims[key] for key in op.spec.tuned_at}
    assert set(op.first_sizes) <= set(op.sizes)


def test_four_sequences_end_in_the_midst_of_blocks():
    for T in PREFILL.sweeps["four-T"].sizes:
        lengths = PREFILL.sweeps["four-T"].case(T, "bfloat16").options["lengths"]
        assert len(lengths) == 4 and sum(lengths) == T
        assert sum(bool(bound % 8) for bound in np.cumsum(lengths)[:-1]) >= 2


@BOTH
@pytest.mark.parametrize("twin", ["triton", "pallas"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_candidates_are_legal_and_few(op, twin, dtype):
    candidates = op.candidates(twin, {"width": 4}, dtype)
    assert 10 <= len(candidates) <= 60
    assert len({tuple(knobs.items()) for knobs in candidates}) == len(candidates)
    for knobs in candidates:
        check_knobs(op.spec.knobs_of(twin), knobs, {"width": 4})


@pytest.mark.parametrize(("option", "value"), [("padding", True), ("tail", 2), ("activation", None), ("bias", False)])
def test_what_cannot_be_drawn_is_an_error(option, value):
    case = prefill("x", lengths=(24,), pool=True)
    with pytest.raises(ValueError, match=r"cannot be benchmarked|expected a bias and SiLU"):
        PREFILL.operands(dataclasses.replace(case, options={**case.options, option: value}))


# -- the reference


@EACH
def test_the_reference_on_the_device_is_the_oracle(case, monkeypatch):
    op = op_of(case)
    for chunk in (_causal_conv1d.CHUNK, 1):
        monkeypatch.setattr(_causal_conv1d, "CHUNK", chunk)
        tensors = draw(op, case, Storage(CPU))
        found = gate.errors(op, case, tensors, oracle_results(op, tensors))
        assert found.keys() == {"y", *op.after_y(tensors)}
        assert found["y"].relative < 1e-15
        assert all(found[name] == (0, 0) for name in op.exact if name in found)


@EACH
def test_a_state_must_be_a_copy_to_the_bit(case):
    op = op_of(case)
    tensors = draw(op, case, Storage(CPU))
    results = stored(op, tensors)
    assert gate.verdict(op, case, gate.errors(op, case, tensors, results)) is None
    (name,) = op.after_y(tensors)
    state = results[name]
    if state.any():
        index = tuple(state.nonzero()[-1])
        state[index] = torch.nextafter(state[index].float() * 1.01, torch.tensor(9.0))
        wrong = gate.verdict(op, case, gate.errors(op, case, tensors, results), slack=10)
        assert wrong is not None and wrong.startswith(f"{name}: expected a copy bit for bit")


WRONG = {
    "one element of y": lambda results: results["y"].view(-1).__setitem__(5, 9.0),
    "NaN in y": lambda results: results["y"].view(-1).__setitem__(-1, float("nan")),
    "a row of y": lambda results: results["y"].view(-1, 64).__setitem__(1, results["y"].view(-1, 64)[0].clone()),
    "a slot": lambda results: results["conv_state"][1].zero_(),
    "NaN in a slot": lambda results: results["conv_state"][2, 0].__setitem__(0, float("nan")),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("case", [CASES[1], CASES[8]], ids=lambda case: case.name)
def test_wrong_results_do_not_pass(case, name):
    op = op_of(case)
    tensors = draw(op, case, Storage(CPU))
    results = stored(op, tensors)
    WRONG[name](results)
    assert gate.verdict(op, case, gate.errors(op, case, tensors, results), slack=10) is not None


# -- the twins


@EACH
@pytest.mark.parametrize("implementation", [TritonTwin(CPU), JaxTwin("xla")], ids=["triton", "xla"])
def test_the_packages_pass_the_gate(case, implementation, interpret):
    if not interpret:
        pytest.skip("runs the interpreters")
    op = op_of(case)
    package = pytest.importorskip("triton_ssm" if implementation.framework == "torch" else "pallas_ssm")
    if not hasattr(package, op.name):
        pytest.skip(f"{package.__name__} has no {op.name}")
    lab = Lab(op, implementation, NO_CLOCK, Storage(CPU))
    for _ in range(2):  # a second check starts from fresh operands
        wrong, errors = lab.check(case, None)
        assert wrong is None
        assert errors["y"] < tolerance(op.name, case.dtype).relative
        assert set(errors.values()) - {errors["y"]} == {0.0}
    call = lab.call(case)
    call.issue()
    call.wait()


def test_results_of_earlier_calls_are_poisoned():
    case = prefill("dense")
    initial = draw(PREFILL, case, Storage(CPU))
    operands = TorchOperands(PREFILL, case, initial, Storage(CPU))
    y, final = initial["x"].clone(), initial["x"][:, :3].clone()
    operands.returned = y, final
    assert operands.results().keys() == {"y", "final_state"}
    operands.reset()
    assert y.isnan().all() and final.isnan().all()
    assert operands.out is not None and operands.out.isnan().all()


def test_a_state_that_is_not_updated_in_place_does_not_pass_for_one():
    case = CASES[0]
    initial = draw(PREFILL, case, Storage(CPU))
    operands = TorchOperands(PREFILL, case, initial, Storage(CPU))
    operands.returned = initial["x"], initial["conv_state"] + 1
    assert torch.equal(operands.results()["conv_state"], initial["conv_state"])
    operands.returned = initial["x"]
    assert operands.results().keys() == {"y", "conv_state"}


# -- from the command line


class CountingClock(FakeClock):
    def cold_us(self, calls, repeats):
        for call in calls:
            call.issue()
            call.wait()
        return [Sample(float(10 + i), 9.0, 20.0, ("kernel",)) for i, _ in enumerate(calls)]


MACHINE = Machine(CPU, Device("NVIDIA H200", (9, 0)), CountingClock(None))


@BOTH
def test_tune_from_end_to_end(op, tmp_path, interpret):
    if not interpret:
        pytest.skip("runs the interpreters")
    few = {"triton": op.candidates("triton", {"width": 4}, "float16")[-2:]}
    short = dataclasses.replace(op, candidates=lambda twin, statics, dtype: few.get(twin, []), first_sizes=(10752,))
    arguments = command.parser().parse_args(
        ["tune", op.name, "--dtype", "float16", "--twin", "triton", "--sizes", "5376", "10752",
         "--tables", str(tmp_path / "tables"), "--log", str(tmp_path / "log")]
    )  # fmt: skip
    assert tune_command.run(short, arguments, MACHINE) == 0
    (path,) = (tmp_path / "tables" / op.name).iterdir()
    assert path.name == "width=4,device_name=NVIDIA_H200,dtype=float16.json"
    entries = read_table(path, op.spec, {"width": 4}).entries
    assert [entry.size for entry in entries] == [5376, 10752]
    assert entries[1].shared == few["triton"][0]
    assert entries[1].tuned_at == dict(zip(op.spec.tuned_at, (2, 5376), strict=True))


@BOTH
def test_run_from_end_to_end(op, tmp_path, monkeypatch, interpret):
    if not interpret:
        pytest.skip("runs the interpreters")
    monkeypatch.setattr(run_command, "COPY_SIZES", (1 << 12,))
    monkeypatch.setattr(run_command, "select", lambda **_: [])
    monkeypatch.setattr(run_command, "host_us", lambda call: 1.0)
    small = [case for case in CASES if case.op == op.name][:2]
    sweeps = {
        str(i): Sweep((7,), lambda size, dtype, case=case: dataclasses.replace(case, name=f"{case.name}: T={size}"))
        for i, case in enumerate(small)
    }
    short = dataclasses.replace(op, sweeps=sweeps)
    arguments = command.parser().parse_args(
        ["run", op.name, "--out", str(tmp_path), "--implementations", "triton", "xla"]
    )
    arguments.sweeps = list(sweeps)
    assert run_command.run(short, arguments, MACHINE) == 0
    _, rows = results.read(tmp_path / f"{op.name}.json")
    assert [row.implementation for row in rows] == ["ceiling:copy", *("triton", "xla") * len(small)]
    assert [row.dims.get("n_seq") for row in rows[1::2]] == [
        len(case.options.get("lengths", ())) or None for case in small
    ]
    assert all(row.error is not None and row.error < 3e-3 and "state_dtype" not in row.dims for row in rows[1:])
    assert len(list(tmp_path.glob("*.png"))) == len(small)


@BOTH
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_pallas_candidate_launches_as_it_says(op, dtype):
    """The kernels move knobs to the nearest launch that a shape has; such a candidate would be measured twice."""
    from pallas_ssm._causal_conv1d_call import Static
    from pallas_ssm._causal_conv1d_launch import plan_prefill, plan_update
    from ssm_configs.contracts import causal_conv1d as contract

    check, plan = (contract.check_prefill, plan_prefill) if op is PREFILL else (contract.check_update, plan_update)
    case = op.case(max(op.sizes), {"width": 4}, dtype)
    operands = op.operands(case)
    dims = check(
        {name: operand.shape for name, operand in operands.items()},
        {name: operand.dtype for name, operand in operands.items()},
    )
    static = Static(op.name, dims, True, None, (dims.D,))
    for knobs in op.candidates("pallas", {"width": 4}, dtype):
        launch = plan(static, case.dtype, knobs)
        assert {name: getattr(launch, name) for name in knobs} == knobs
