"""The declaration of `selective_state_update`: byte count, candidates, and its float64 reference against the oracle."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import gate
from benchmarks.implementations import JaxTwin, TritonTwin
from benchmarks.lab import Lab
from benchmarks.op import Storage, draw
from benchmarks.ops import OPS
from ssm_configs.spec import check_knobs

from . import oracle
from .cases import Case
from .test_benchmarks_tune import FakeClock
from .tolerances import tolerance

OP = OPS["selective_state_update"]
CPU = torch.device("cpu")
NO_CLOCK = FakeClock(lambda size, rows: 0, sessions=0)
SMALL = Case(OP.name, "small", {"S": 7, "B": 3, "H": 4, "G": 2, "P": 16, "N": 32}, "bfloat16", "float16")


def test_bytes_by_hand():
    # B=1 H=128 G=8 P=64 N=128, 16-bit state: 4,231,424 bytes of state, x, y, dt, B and C, as the peers' figures count;
    # and three parameters a head, one slot
    case = OP.case(128, {"headdim": 64, "dstate": 128}, "float16")
    assert OP.bytes_moved(case) == 4_231_424 + 3 * 128 * 4 + 4
    assert OP.flops(case) == 128 * 64 * (5 * 128 + 3)


@pytest.mark.parametrize(("size", "B", "H", "G"), [(8, 1, 8, 8), (128, 1, 128, 8), (12288, 96, 128, 8), (4, 1, 4, 1)])
def test_the_shape_behind_a_key(size, B, H, G):
    case = OP.case(size, {"headdim": 64, "dstate": 128}, "float32")
    assert [case.dims[key] for key in ("B", "H", "G")] == [B, H, G]
    assert OP.table_key(case) == (size, {"headdim": 64, "dstate": 128})


def test_a_key_without_a_shape_is_an_error():
    with pytest.raises(ValueError, match="multiple of 128, got 200"):
        OP.case(200, {"headdim": 64, "dstate": 128}, "float32")


@pytest.mark.parametrize("twin", ["triton", "pallas"])
def test_candidates_are_legal_and_few(twin):
    for headdim in OP.grid["headdim"]:
        for dstate in OP.grid["dstate"]:
            for dtype in OP.spec.dtypes:
                statics = {"headdim": headdim, "dstate": dstate}
                candidates = OP.candidates(twin, statics, dtype)
                assert 5 <= len(candidates) <= 24
                assert len({tuple(knobs.items()) for knobs in candidates}) == len(candidates)
                for knobs in candidates:
                    check_knobs(OP.spec.knobs_of(twin), knobs, statics)


def test_a_pallas_candidate_launches_as_it_says():
    """The kernel moves knobs to the nearest launch that a shape has; such a candidate would be measured twice."""
    from pallas_ssm._selective_state_update_launch import plan_launch
    from ssm_configs.contracts.selective_state_update import check

    for headdim in OP.grid["headdim"]:
        for dstate in OP.grid["dstate"]:
            for dtype in OP.spec.dtypes:
                statics = {"headdim": headdim, "dstate": dstate}
                operands = OP.operands(OP.case(16384, statics, dtype))
                dims = check(
                    {name: operand.shape for name, operand in operands.items()},
                    {name: operand.dtype for name, operand in operands.items()},
                )
                for knobs in OP.candidates("pallas", statics, dtype):
                    launch = plan_launch(dims, dtype, knobs, packed=False, stochastic=False)
                    assert {name: getattr(launch, name) for name in knobs} == knobs


def numpy(tensors):
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def reference(tensors):
    """y and the state by the NumPy oracle."""
    arrays = numpy(tensors)
    named = {name: arrays[name] for name in ("D", "dt_bias")}
    slots = tensors["state_batch_indices"].numpy()
    y, state = oracle.selective_state_update(
        *(arrays[name] for name in OP.positional), **named, **OP.scalars(SMALL), state_batch_indices=slots
    )
    return {"y": torch.from_numpy(y), "state": torch.from_numpy(state)}


def stored(tensors):
    """The same as an implementation would store it."""
    results = reference(tensors)
    return {"y": results["y"].to(tensors["x"].dtype), "state": results["state"].to(tensors["state"].dtype)}


def test_the_reference_on_the_device_is_the_oracle():
    tensors = draw(OP, SMALL, Storage(CPU))
    found = gate.errors(OP, SMALL, tensors, reference(tensors))
    assert found.keys() == {"y", "state"}
    assert all(error.relative < 1e-15 and error.worst < 1e-15 for error in found.values())


def test_the_reference_in_many_pieces(monkeypatch):
    from benchmarks.ops import selective_state_update

    monkeypatch.setattr(selective_state_update, "_CHUNK", 1)
    tensors = draw(OP, SMALL, Storage(CPU))
    assert len(list(OP.pieces(SMALL, tensors))) > SMALL.dims["B"]
    results = stored(tensors)
    assert gate.verdict(OP, SMALL, gate.errors(OP, SMALL, tensors, results)) is None


def _flip_slot(results, tensors):
    spare = sorted(set(range(7)) - set(tensors["state_batch_indices"].tolist()))[0]
    results["state"][spare, 0, 0, 0] += 1


def _old_state(results, tensors):
    results["state"][tensors["state_batch_indices"][1]] = tensors["state"][tensors["state_batch_indices"][1]]


WRONG = {
    "one wrong element of y": lambda results, tensors: results["y"][1, 2].__setitem__(3, 7.0),
    "y of another row": lambda results, tensors: results["y"].__setitem__(0, results["y"][1].clone()),
    "NaN in y": lambda results, tensors: results["y"][0, 0].__setitem__(0, float("nan")),
    "NaN in the state": lambda results, tensors: results["state"][0, 0, 0].__setitem__(0, float("nan")),
    "a slot that nobody writes": _flip_slot,
    "a state that was not stored": _old_state,
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_do_not_pass(name):
    tensors = draw(OP, SMALL, Storage(CPU))
    results = stored(tensors)
    WRONG[name](results, tensors)
    found = gate.errors(OP, SMALL, tensors, results)
    assert gate.verdict(OP, SMALL, found) is not None
    assert gate.verdict(OP, SMALL, found, slack=10) is not None


def test_a_reference_that_leaves_something_out_is_an_error():
    first_only = dataclasses.replace(OP, pieces=lambda case, tensors: iter(list(OP.pieces(case, tensors))[:2]))
    tensors = draw(OP, SMALL, Storage(CPU))
    with pytest.raises(ValueError, match=r"the reference covers .* elements of state"):
        gate.errors(first_only, SMALL, tensors, reference(tensors))


def test_parameters_are_drawn_as_the_models_initialise_them():
    case = OP.case(16384, {"headdim": 4, "dstate": 8}, "float32")
    tensors = draw(OP, case, Storage(CPU))
    assert tensors["A"].min() >= -16 and tensors["A"].max() <= -1
    step = np.logaddexp(0, tensors["dt_bias"].double().numpy())
    assert 0.9e-3 < step.min() and step.max() < 0.11
    assert sorted(tensors["state_batch_indices"].tolist()) == list(range(128))
    assert tensors["state_batch_indices"].tolist() != list(range(128))
    again = draw(OP, case, Storage(CPU))
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_storage_is_reused_from_large_to_small():
    storage = Storage(CPU)
    large = storage.take("state", (4, 8), "float32")
    assert storage.take("state", (3, 5), "bfloat16").data_ptr() == large.data_ptr()


@pytest.mark.parametrize(
    ("implementation", "knobs"),
    [(TritonTwin(CPU), {"BLOCK_SIZE_M": 8, "num_warps": 2}), (TritonTwin(CPU), None), (JaxTwin("xla"), None)],
    ids=["triton, pinned", "triton, as the tables say", "xla"],
)
def test_the_packages_pass_the_gate(implementation, knobs, interpret):
    if not interpret:
        pytest.skip("runs the interpreters")
    lab = Lab(OP, implementation, NO_CLOCK, Storage(CPU))
    for _ in range(2):  # a second check starts from fresh operands
        wrong, errors = lab.check(SMALL, knobs)
        assert wrong is None
        assert errors["y"] < tolerance(OP.name, "bfloat16").relative
        assert errors["state"] < tolerance(OP.name, "float16").relative
    call = lab.call(SMALL, knobs)
    call.issue()
    call.wait()


def test_what_cannot_be_compiled_is_reported_and_raises_when_called():
    class Refusing(JaxTwin):
        def compile(self, op, case, knobs):
            raise NotImplementedError("no layout\nfor this")

    lab = Lab(OP, Refusing("mosaic_gpu"), NO_CLOCK, Storage(CPU))
    assert lab.failure(SMALL, None) == "NotImplementedError: no layout"
    assert lab.check(SMALL, None)[0] == "NotImplementedError: no layout"
    with pytest.raises(NotImplementedError):
        lab.call(SMALL)


def test_a_config_is_pinned_in_a_process_that_has_compiled_nothing():
    """The package is imported first: it listens to overrides, and must not miss one."""
    code = (
        "import sys; from benchmarks.implementations import JaxTwin; from benchmarks.ops import OPS;"
        "op = OPS['selective_state_update']; assert 'pallas_ssm' not in sys.modules;"
        "case = op.case(8, {'headdim': 64, 'dstate': 128}, 'float32');"
        "JaxTwin('xla').compile(op, case, op.candidates('pallas', {'headdim': 64, 'dstate': 128}, 'float32')[0])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
