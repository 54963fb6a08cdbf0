"""What only a GPU shows of the five stages of `mamba_chunk_scan_combined`: compiled products, graphs, one compile for all."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from ssm_configs import override
from ssm_configs.model_dims import ModelDims

from .cases import Case
from .compare import against_oracle
from .inputs import draw
from .operators import OPERATORS, oracle_results
from .runners import to_torch, torch_runner

OP = "mamba_chunk_scan_combined"
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")]


@pytest.fixture(autouse=True)
def five_stages():
    with override(OP, FUSED=False):
        yield


def case(P: int, N: int, L: int, dtype: str, **options: Any) -> Case:
    """Long enough for four steps of every loop; decays slow enough that chunks matter to each other."""
    dims = {"B": 1, "T": 720, "H": 8, "G": 2, "P": P, "N": N, "L": L}
    defaults = {
        "D": True,
        "z": True,
        "slow": True,
        "initial": True,
        "lengths": (300, 0, 1, 259, 140),
        "tail": 20,
        "poison": True,
    }
    return Case(OP, "compiled", dims, dtype, options=defaults | options)


# dstate 256 in a packed call is where ptxas dropped the products of a pipelined loop.
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("P, N, L", [(64, 128, 128), (80, 128, 256), (64, 256, 128), (16, 16, 64), (128, 64, 2048)])
def test_compiled_products(P, N, L, dtype):
    drawn = case(P, N, L, dtype)
    arguments, keywords = draw(drawn)
    run = torch_runner(OPERATORS[OP], None, interpret=False)
    first = run(arguments, keywords)
    for comparison in against_oracle(drawn, arguments, keywords, first, oracle_results(drawn, arguments, keywords)):
        assert comparison.ok, comparison
    for _ in range(5):
        again = run(arguments, keywords)
        assert all(first[name].tobytes() == again[name].tobytes() for name in first), "not the same bits"


# Every pair of blocks and steps that a table may hold is gated when it is tuned; these have each loop more than two steps.
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_pipelined_loops(num_stages):
    drawn = case(64, 256, 256, "bfloat16")
    arguments, keywords = draw(drawn)
    with (
        override("ssd_chunk_state", BLOCK_SIZE_K=32, num_stages=num_stages),
        override("ssd_chunk_scan", BLOCK_SIZE_K=32, num_stages=num_stages),
    ):
        result = torch_runner(OPERATORS[OP], None, interpret=False)(arguments, keywords)
    for comparison in against_oracle(drawn, arguments, keywords, result, oracle_results(drawn, arguments, keywords)):
        assert comparison.ok, comparison


def _call(**options: Any):
    import torch

    import triton_ssm

    arguments, keywords = draw(case(64, 128, 128, "bfloat16", **options))
    tensors = [to_torch(value, "cuda") for value in arguments]
    named = {name: to_torch(value, "cuda") for name, value in keywords.items()}
    torch.cuda.synchronize()
    return tensors, named, triton_ssm.mamba_chunk_scan_combined


def test_a_graph_replays_the_call():
    import torch

    from . import graphs

    tensors, named, call = _call()
    expected = call(*tensors, **named)
    with graphs.capture() as graph:
        got = call(*tensors, **named)
    for tensor in got:
        tensor.fill_(float("nan"))
    graph.replay()
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_a_split_prompt_resumes_bit_for_bit():
    import torch

    (x, dt, A, B, C), named, call = _call(lengths=(720,), tail=0, initial=False, poison=False)
    del named["cu_seqlens"]
    z = named.pop("z")
    whole, final = call(x, dt, A, B, C, **named, z=z)
    cut = 384
    first, state = call(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], **named, z=z[:, :cut])
    rest = (x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:])
    second, end = call(*rest, **named, z=z[:, cut:], initial_states=state)
    assert torch.equal(torch.cat([first, second], 1), whole) and torch.equal(end, final)


@pytest.fixture
def one_config():
    """Of every stage: a size picks a config, and a config is a kernel of its own."""
    import torch

    from triton_ssm import _warmup_jobs
    from triton_ssm._device import tuning_device

    dims, device = ModelDims(heads=8, groups=2, headdim=64, dstate=128, chunk_size=128), torch.device("cuda", 0)
    request = _warmup_jobs.Request(
        dims, device, tuning_device(device), 720, 40, (OP,), ("packed",), ("plain",), 0, False, False
    )  # fmt: skip
    with ExitStack() as stack:
        for op, config in _warmup_jobs._stage_pins(request)[0].items():
            stack.enter_context(override(op, twin="triton", **dict(config)))
        yield


def test_any_packing_reuses_the_compiled_kernels(one_config):
    import torch

    from triton_ssm.forbid_compiles import forbid_compiles

    (x, dt, A, B, C), named, call = _call(initial=False, poison=False)
    z = named.pop("z")
    call(x, dt, A, B, C, **named, z=z)
    rng = np.random.default_rng(0)
    with forbid_compiles():
        for _ in range(50):
            T = int(rng.integers(2, 721))
            cuts = np.sort(rng.integers(0, T + 1, rng.integers(1, 40)))
            named["cu_seqlens"] = torch.tensor([0, *cuts.tolist()], device="cuda", dtype=torch.int32)
            call(x[:, :T], dt[:, :T], A, B[:, :T], C[:, :T], **named, z=z[:, :T])
