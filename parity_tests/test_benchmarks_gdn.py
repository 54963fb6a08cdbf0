"""The declarations of the gated delta rule's ops: bytes, shapes behind keys, the float64 references against the oracle."""

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks import gate, run_command, table
from benchmarks.implementations import JaxTwin, TritonTwin
from benchmarks.lab import Lab
from benchmarks.op import Storage, draw
from benchmarks.ops import OPS
from ssm_configs.spec import check_knobs

from .cases import Case
from .oracle import gdn as oracle
from .test_benchmarks_tune import FakeClock

CHUNKED, CHUNK_O, DECODE = (
    OPS[name] for name in ("chunk_gated_delta_rule", "gdn_chunk_o", "fused_recurrent_gated_delta_rule")
)
ALL = pytest.mark.parametrize("op", [CHUNKED, CHUNK_O, DECODE], ids=lambda op: op.name)
CPU = torch.device("cpu")
NO_CLOCK = FakeClock(lambda size, rows: 0, sessions=0)
STATICS = {"K": 128, "V": 128, "chunk_size": 64}
SERVED = {"slots": True, "gates": True, "l2norm": True}


def tokens(op: str, name: str, T: int = 70, B: int = 1, dtype: str = "bfloat16", **options: Any) -> Case:
    return Case(op, name, {"B": B, "T": T, "H_k": 1, "H_v": 2, "K": 16, "V": 32, "L": 64}, dtype, options=options)


def decode(name: str, state_dtype: str = "float32") -> Case:
    dims = {"S": 5, "B": 3, "H_k": 1, "H_v": 2, "K": 16, "V": 32}
    return Case("fused_recurrent_gated_delta_rule", name, dims, "bfloat16", state_dtype, SERVED)


CASES = [
    tokens("chunk_gated_delta_rule", "dense", B=2),
    tokens("chunk_gated_delta_rule", "packed, resumed", lengths=(1, 45, 0, 24), initial=True),
    tokens("chunk_gated_delta_rule", "longer than the reference's chunks", T=150, l2norm=True, slow=True),
    tokens("gdn.chunk_o", "dense", B=2),
    tokens("gdn.chunk_o", "packed, fp16", T=150, dtype="float16", lengths=(1, 80, 0, 69)),
    decode("decode"),
    decode("decode, bf16 states", "bfloat16"),
]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")


def op_of(case: Case):
    return OPS[case.op.replace(".", "_")]


def oracle_results(case: Case, tensors) -> dict[str, torch.Tensor]:
    """y and the states by the NumPy definition."""
    op = op_of(case)
    arrays = {
        name: (tensor.double() if tensor.is_floating_point() else tensor).numpy() for name, tensor in tensors.items()
    }
    positional = [arrays.pop(name) for name in op.positional]
    scalars = {name: value for name, value in op.scalars(case).items() if name != "return_final_state"}
    returned = getattr(oracle, case.op.rpartition(".")[2])(*positional, **arrays, **scalars)
    y, *after = returned if isinstance(returned, tuple) else (returned,)
    found = {"y": y, **dict(zip(op.after_y(tensors), after, strict=True))}
    return {name: torch.from_numpy(result) for name, result in found.items()}


# -- shapes, bytes, candidates


def test_bytes_and_flops_by_hand():
    # 1 x 8192, (16, 32): 24,832 bytes a token of q, k, v, o, g and beta; 2 MiB of final states; 163,840 flops a value head
    case = CHUNKED.case(32, STATICS, "float16")
    assert (case.dims["B"], case.dims["T"], case.dims["H_k"]) == (1, 8192, 16)
    assert CHUNKED.bytes_moved(case) == 8192 * (4 * 16 * 128 + 4 * 32 * 128 + 8 * 32) + 4 * 32 * 128 * 128
    assert CHUNKED.flops(case) == 8192 * 32 * 163_840
    # chunk_o: v_new, h and o of a value head are 1024 bytes a token, and its gate four
    case = CHUNK_O.case(8192 * 32, STATICS, "float16")
    assert CHUNK_O.bytes_moved(case) == 8192 * (4 * 16 * 128 + 32 * (256 + 512 + 256 + 4))
    assert CHUNK_O.flops(case) == 8192 * 32 * 65_536
    # decode, 64 sequences of 32 heads: states in and out, q, k, v, o, gate and beta, slots
    case = DECODE.case(64 * 32, {"K": 128, "V": 128}, "float32")
    assert DECODE.bytes_moved(case) == 64 * (32 * (2 * 128 * 128 * 4 + 4 * 128 + 4) + 4 * 16 * 128 + 4) + 2 * 32 * 4


def test_packed_states_and_initial_ones_count():
    packed = CHUNKED.sweeps["H32-packed"].case(8192, "bfloat16")
    dense = CHUNKED.sweeps["H32"].case(8192, "bfloat16")
    state = 4 * 32 * 128 * 128
    assert CHUNKED.bytes_moved(packed) - CHUNKED.bytes_moved(dense) == (2 * 4 - 1) * state
    assert sum(packed.options["lengths"]) == 8192 and all(length % 16 for length in packed.options["lengths"])


@ALL
def test_every_tuned_key_has_a_shape(op):
    statics = {key: STATICS[key] for key in op.spec.static_keys}
    for dtype in op.spec.dtypes:
        for size in op.sizes:
            case = op.case(size, statics, dtype)
            assert op.table_key(case) == (size, statics)
            assert op.spec.table_dtype(op.dtype_of(case)) == dtype and {case.dims[key] for key in op.spec.tuned_at}
            assert case.dims["H_v"] % case.dims["H_k"] == 0
            # The same row of the table, so the same kernels; of chunk_o every row has its own.
            if op is not CHUNK_O:
                single = op.single(case)
                assert op.table_key(single)[1] == statics and op.bytes_moved(single) <= op.bytes_moved(case)
    assert set(op.first_sizes) <= set(op.sizes)


@ALL
def test_a_key_without_a_shape_is_an_error(op):
    statics = {key: STATICS[key] for key in op.spec.static_keys}
    with pytest.raises(ValueError, match=r"size: expected .* got 33"):
        op.case(33, statics, "float16")


@ALL
@pytest.mark.parametrize("twin", ["triton", "pallas"])
def test_candidates_are_legal_and_few(op, twin):
    for dtype in op.spec.dtypes:
        for dim in (64, 128):
            statics = {key: {**STATICS, "K": dim, "V": dim}[key] for key in op.spec.static_keys}
            candidates = op.candidates(twin, statics, dtype)
            assert 1 <= len(candidates) <= 70
            assert len({tuple(knobs.items()) for knobs in candidates}) == len(candidates)
            for knobs in candidates:
                check_knobs(op.spec.knobs_of(twin), knobs, statics)


@pytest.mark.parametrize(
    ("case", "option"), [(CASES[0], "resembling"), (CASES[3], "gate_base"), (CASES[5], "spec")], ids=str
)
def test_what_cannot_be_drawn_is_an_error(case, option):
    with pytest.raises(ValueError, match=f"{option} cannot be benchmarked"):
        op_of(case).operands(dataclasses.replace(case, options={**case.options, option: "2"}))


def test_decode_without_slots_is_an_error():
    with pytest.raises(ValueError, match="expected slots, gates, l2norm, as serving has them"):
        DECODE.operands(dataclasses.replace(CASES[5], options={"slots": True}))


def test_draws_are_what_models_have():
    case = CHUNKED.sweeps["H8"].case(64, "bfloat16")
    tensors = draw(CHUNKED, case, Storage(CPU))
    norms = tensors["k"].float().norm(dim=-1)
    assert (norms - 1).abs().max() < 1e-2
    assert tensors["g"].max() < 0 and tensors["g"].min() > -60 and 0 < tensors["beta"].min() < tensors["beta"].max() < 1
    slow = draw(CHUNKED, dataclasses.replace(case, options={"slow": True}), Storage(CPU))
    assert slow["g"].mean() > 0.05 * tensors["g"].mean()
    slots = draw(DECODE, CASES[5], Storage(CPU))["state_indices"].tolist()
    assert 0 not in slots and len(set(slots)) == 3


def test_every_line_of_the_readmes_table_is_a_point_of_a_sweep():
    for name, lines in table.LINES.items():
        op = OPS[name]
        points = {case.name for case in run_command.sweep(op, list(op.sweeps), None, op.run_dtypes)}
        assert {line.case for line in lines} <= points


# -- the reference


@EACH
def test_the_reference_on_the_device_is_the_oracle(case):
    op = op_of(case)
    tensors = draw(op, case, Storage(CPU))
    found = gate.errors(op, case, tensors, oracle_results(case, tensors))
    assert found.keys() == {"y", *op.after_y(tensors)}
    assert all(error.relative < 1e-12 for error in found.values()), found


WRONG = {
    "one element of y": lambda results: results["y"].view(-1).__setitem__(5, 9.0),
    "NaN in y": lambda results: results["y"].view(-1).__setitem__(-1, float("nan")),
    "y, 1 %": lambda results: results["y"].mul_(1.02),
    "a state": lambda results: results["final"][-1].zero_(),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_do_not_pass(name):
    case = CASES[1]
    tensors = draw(CHUNKED, case, Storage(CPU))
    results = oracle_results(case, tensors)
    assert gate.verdict(CHUNKED, case, gate.errors(CHUNKED, case, tensors, results)) is None
    WRONG[name](results)
    assert gate.verdict(CHUNKED, case, gate.errors(CHUNKED, case, tensors, results)) is not None


# -- the twins


@EACH
@pytest.mark.parametrize("implementation", [TritonTwin(CPU), JaxTwin("xla")], ids=["triton", "xla"])
@pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")
def test_the_packages_pass_the_gate(case, implementation, interpret):
    if not interpret:
        pytest.skip("runs the interpreters")
    op = op_of(case)
    lab = Lab(op, implementation, NO_CLOCK, Storage(CPU))
    for _ in range(2):  # a second check starts from fresh operands
        wrong, errors = lab.check(case, None)
        assert wrong is None
        assert errors.keys() == {"y", *op.after_y(op.operands(case))}
