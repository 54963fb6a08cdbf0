"""What only a GPU shows of every operator: compiled kernels, big grids, CUDA graphs, no synchronisation, no race."""

import os
import shutil
import subprocess
import sys

import pytest

from . import report, runners
from .cases import Case, select
from .inputs import draw
from .operators import OPERATORS

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def twins():
    return {op: runners.twins(op, interpret=False) for op in OPERATORS}


def named(case: Case) -> str:
    return f"{case.op}: {case}"


@pytest.mark.parametrize("case", select(tags=("ci", "odd", "standard")), ids=named)
def test_registry(case, twins):
    result = report.check_case(case, twins[case.op], runners.device(interpret=False))
    assert result.ok, result.failures


@pytest.mark.parametrize("case", [case for case in select(tags=("large",)) if "65,535" in case.name], ids=named)
def test_more_than_65535_rows(case, twins):
    result = report.check_case(case, twins[case.op], runners.device(interpret=False))
    assert result.ok, result.failures


NAMES = {
    "selective_state_update": (
        "gate z, bf16 state", "speculative, 16-bit states, padding", "packed, zero lengths, padded tail",
        "stochastic rounding to bf16",
    ),
    "causal_conv1d": ("width 4, packed", "pool, padding and null slot", "split, chunk-aligned, pool"),
    "causal_conv1d_update": ("padding and null slot", "speculative, padding, short pool", "packed, zero lengths, tail"),
    "mamba_chunk_scan_combined": (
        "packed, everything", "packed, aligned, slow decay", "every chunk's state, 16-bit", "fp32, packed, everything",
    ),
    "gdn.chunk_o": ("packed", "gates in powers of two, states [V,K]"),
    "gdn.chunk_delta_h": ("dense", "no gate, chunks of 32"),  # packed, slots without a chunk hold what was there
    "chunk_gated_delta_rule": (
        "packed, everything", "packed, fp16 states, gates and beta", "fp32, packed, everything", "K=60 V=100",
    ),
    "fused_recurrent_gated_delta_rule": (
        "as a model calls it", "packed, zero lengths, padded tail", "speculative, 16-bit states, padding",
    ),
}  # fmt: skip
CAPTURED = [case for case in select(tags=("odd",)) if case.name in NAMES.get(case.op, ())]


def test_every_name_is_a_case():
    assert len(CAPTURED) == sum(len(names) for names in NAMES.values())


def _torch_call(case):
    """(call without arguments, the state that it updates in place or None); the call returns all results."""
    import torch

    import triton_ssm

    operator = OPERATORS[case.op]
    arguments, keywords = draw(case)
    tensors = [runners.to_torch(a, "cuda") for a in arguments]
    named = {name: runners.to_torch(value, "cuda") for name, value in keywords.items()}
    state = named.get("conv_state") if operator.mutated is None else tensors[operator.mutated]
    function = operator.function(triton_ssm, keywords)
    torch.cuda.synchronize()
    return lambda: operator.torch_results(function(*tensors, **named), tensors), state


@pytest.mark.parametrize("case", CAPTURED, ids=named)
def test_cuda_graph_replay_equals_the_call(case):
    import torch

    from . import graphs

    call, state = _torch_call(case)
    start = None if state is None else state.clone()
    expected = {name: tensor.clone() for name, tensor in call().items()}
    with graphs.capture() as graph:
        replayed = call()
    for name, tensor in replayed.items():
        if name != "state":
            tensor.fill_(float("nan"))
    if state is not None:
        state.copy_(start)
    graph.replay()
    for name, tensor in expected.items():
        assert torch.equal(replayed[name], tensor), name


@pytest.mark.parametrize("case", CAPTURED, ids=named)
def test_no_host_synchronisation(case):
    import torch

    call, _ = _torch_call(case)
    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CAPTURED, ids=named)
def test_repeats_give_the_same_bits(case, twins):
    arguments, keywords = draw(case)
    for name, run in twins[case.op].items():
        if name == "mosaic_gpu" and "no-mosaic" in case.tags:
            continue
        first, again = run(arguments, keywords), run(arguments, keywords)
        assert all(first[key].tobytes() == again[key].tobytes() for key in first), name


# Warp-specialised Gluon kernels, of which racecheck reports what is none: see `racecheck_witness`.
UNWATCHED = {"memcheck": (), "racecheck": ("--kernel-name-exclude", "kernel_substring=hopper")}


def _sanitized(tool: str, module: str) -> "subprocess.CompletedProcess[str]":
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    done = subprocess.run(
        [sanitizer, "--tool", tool, *UNWATCHED[tool], "--error-exitcode", "99", sys.executable, "-m", module],
        capture_output=True, text=True, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine")
    return done


@pytest.mark.timeout(900)
@pytest.mark.parametrize("tool", UNWATCHED)
def test_compute_sanitizer(tool):
    done = _sanitized(tool, "parity_tests.sanitize")
    said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(" ")]
    assert done.returncode == 0, "\n".join(said)[-6000:]
    assert "0 errors" in done.stdout + done.stderr or "ERROR SUMMARY: 0" in done.stdout + done.stderr


def test_racecheck_still_misjudges_a_warp_that_arrives_as_one():
    """Once it does not, the Gluon kernels can be watched too."""
    done = _sanitized("racecheck", "parity_tests.racecheck_witness")
    assert done.returncode == 99 and "racecheck_witness_kernel" in done.stdout, (done.stdout + done.stderr)[-3000:]


def test_a_strided_out_gets_a_kernel_of_its_own():
    """A launch that is remembered for a dense out must not serve one whose rows are not 16-byte aligned."""
    import torch

    import triton_ssm

    x = torch.randn(8, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(512, 4, device="cuda", dtype=torch.bfloat16)
    state = torch.randn(8, 3, 512, device="cuda", dtype=torch.bfloat16)
    expected = triton_ssm.causal_conv1d_update(x, state.clone(), weight)
    for width in (513, 520, 512):
        out = torch.full((8, width), float("nan"), device="cuda", dtype=torch.bfloat16)
        triton_ssm.causal_conv1d_update(x, state.clone(), weight, out=out[:, :512])
        assert torch.equal(out[:, :512], expected) and out[:, 512:].isnan().all()


def test_triton_runs_what_it_has_compiled_and_refuses_the_rest():
    import torch

    import triton_ssm
    from ssm_configs.late_compile import LateCompileError

    def convolve(width, rows=8):
        x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
        state = torch.randn(rows, width - 1, 512, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(512, width, device="cuda", dtype=torch.bfloat16)
        return triton_ssm.causal_conv1d_update(x, state, weight)

    convolve(4)
    with triton_ssm.forbid_compiles():
        convolve(4, rows=5)
        with pytest.raises(LateCompileError, match=r"causal_conv1d_update_kernel: .*W is 2, was 4"):
            convolve(2)
    convolve(2)
