"""The fused path's compiled kernels against the float64 oracle, every option: `pytest -m gpu`."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from triton_ssm.ssd import _fused, _fused_gluon

from . import graphs
from .test_triton_ssd_fused import arguments, check, expected, run, to_aligned

pytestmark = pytest.mark.gpu
BOUNDS = {"bfloat16": 6e-3, "float16": 1e-3}
LENGTHS = (300, 0, 5, 64, 700, 1)
SIZES: dict[str, Any] = {"P": 64, "N": 128, "H": 4, "G": 2}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("N", [64, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_hopper(packed: bool, N: int, heads: int, dtype: str):
    sizes: dict[str, Any] = SIZES | {"N": N}
    given = arguments(LENGTHS, packed=True, pad=90, dtype=dtype, **sizes) if packed else (
        arguments((500,), B=3, dtype=dtype, D=2, **sizes)
    )  # fmt: skip
    for piece, splits in ((2, 2), (4, 1), (1000, 1)):
        got = run(given, piece=piece, splits=splits, intermediate=True, device="cuda", heads=heads)
        check(got, expected(given, intermediate=True), BOUNDS[dtype])


@pytest.mark.parametrize("heads", [1, 2])
def test_many_pieces_and_repeats(heads: int):
    given = arguments((64 * 40 + 9,), dtype="bfloat16", z=False, **SIZES)
    first = run(given, piece=2, device="cuda", heads=heads)
    check(first, expected(given), BOUNDS["bfloat16"])
    for _ in range(20):
        again = run(given, piece=2, device="cuda", heads=heads)
        assert all(np.array_equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_size", [16, 128])
def test_chunk_aligned(chunk_size: int, packed: bool, heads: int):
    given = arguments(LENGTHS if packed else (100,), packed=packed, B=1 if packed else 2, dtype="bfloat16", **SIZES)
    got = run(to_aligned(given, chunk_size), chunk_size=chunk_size, aligned=True, piece=2, device="cuda", heads=heads)
    check(got, expected(given, chunk_size=chunk_size), BOUNDS["bfloat16"])


@pytest.mark.parametrize("chunk_size", [64, 128, 256])
def test_intermediate_states(chunk_size: int):
    given = arguments((300, 0, 128, 40), packed=True, dtype="bfloat16", **SIZES)
    got = run(given, chunk_size=chunk_size, piece=3, intermediate=True, device="cuda", heads=2)
    check(got, expected(given, chunk_size=chunk_size, intermediate=True), BOUNDS["bfloat16"])


@pytest.mark.parametrize("heads", [1, 2])
def test_a_pool(heads: int):
    given = arguments((70, 0, 5, 20), packed=True, dtype="bfloat16", **SIZES)
    want = expected(given)["final"]
    got = run(given, pool=np.array([3, 1, -1, 9], np.int32), slots=5, device="cuda", heads=heads)["final"]
    check({"final": got[[3, 1]]}, {"final": want[[0, 1]]}, BOUNDS["bfloat16"])
    assert np.isnan(got[[0, 2, 4]]).all()


@pytest.mark.parametrize("heads", [1, 2])
def test_what_others_hold_does_not_matter(heads: int):
    given = arguments(LENGTHS, packed=True, pad=90, dtype="bfloat16", **SIZES)
    clean = run(given, piece=2, device="cuda", heads=heads)
    for sequence in (0, 2, 4):
        begin, end = given["cu_seqlens"][sequence : sequence + 2]
        dirty = dict(given)
        for name in ("x", "dt", "B", "C", "z"):
            dirty[name] = np.full_like(given[name], np.nan)
            dirty[name][:, begin:end] = given[name][:, begin:end]
        got = run(dirty, piece=2, device="cuda", heads=heads)
        np.testing.assert_array_equal(got["y"][:, begin:end], clean["y"][:, begin:end])
        np.testing.assert_array_equal(got["final"][sequence], clean["final"][sequence])
        assert not got["y"][:, given["cu_seqlens"][-1] :].any()


@pytest.mark.parametrize("P, N", [(64, 128), (80, 128), (16, 16), (128, 64)])
def test_plain_kernels(monkeypatch: pytest.MonkeyPatch, P: int, N: int):
    monkeypatch.setattr(_fused_gluon, "serves", lambda *_: False)
    given = arguments(LENGTHS, packed=True, pad=90, dtype="bfloat16", P=P, N=N, H=4, G=2)
    got = run(given, piece=2, intermediate=True, device="cuda")
    check(got, expected(given, intermediate=True), BOUNDS["bfloat16"])


def test_a_graph_captures_it():
    from ssm_configs.contracts.ssd import Dims

    T, H, P, N = 200, 2, 64, 128
    x, B, C, z = (torch.randn(1, T, *shape, device="cuda").bfloat16() for shape in ((H, P), (1, N), (1, N), (H, P)))
    dt, A = torch.rand(1, T, H, device="cuda"), -torch.rand(H, device="cuda")
    y, again = torch.empty_like(x), torch.empty_like(x)
    dims = Dims(1, T, H, 1, P, N, 64, 4, 1, False, T)
    config = {"CHUNKS_PER_PIECE": 2, "STATES_PER_PIECE": 1, "HEADS_PER_BLOCK": 2, "num_stages": 4}

    def call(out):
        _fused.run(
            "graph", dims, config, x, dt, A, B, C, D=None, z=z, dt_bias=None, dt_softplus=False, dt_limit=(0.0, math.inf),
            initial_states=None, cu_seqlens=None, y=out, final=None, final_indices=None, intermediate=None, chunk_aligned=False,
        )  # fmt: skip

    call(y)
    torch.cuda.synchronize()
    with graphs.capture() as graph:
        call(again)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, again)
