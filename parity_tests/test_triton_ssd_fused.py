"""The fused path of triton_ssm's `mamba_chunk_scan_combined` against the float64 oracle, in the interpreter."""

import ast
import importlib
import inspect
import itertools
import math
import textwrap
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from ssm_configs.contracts import ssd as contract
from triton_ssm._plans import call_key
from triton_ssm.ssd import _fused

from .oracle import ssd as oracle
from .runners import from_torch, to_torch

MODULES = (
    "_fused_dt_kernel", "_fused_state_kernel", "_fused_out_kernel", "_fused_gluon_state_kernel", "_fused_gluon_out_kernel",
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LENGTHS = (70, 0, 5, 64, 130, 1)


def arguments(
    lengths: tuple[int, ...] = (150,), *, B: int = 1, H: int = 2, G: int = 1, P: int = 16, N: int = 16, packed: bool = False,
    pad: int = 0, dtype: str = "float32", slow: bool = True, D: int = 1, z: bool = True, initial: bool = True, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """`slow`: a decay that couples tokens hundreds apart, so that a wrong state between pieces shows."""
    draw = np.random.default_rng(seed)
    T = sum(lengths) + pad
    kind = np.dtype(dtype) if dtype != "bfloat16" else np.dtype(ml_dtypes.bfloat16)

    def normal(*shape):
        return draw.standard_normal(shape).astype(kind)

    A = -draw.uniform(0.001, 0.1, H) if slow else -draw.uniform(1, 16, H)
    found: dict[str, Any] = {
        "x": normal(B, T, H, P), "dt": normal(B, T, H), "A": A.astype(np.float32), "B": normal(B, T, G, N),
        "C": normal(B, T, G, N), "dt_bias": (draw.standard_normal(H) - (5 if slow else 1)).astype(np.float32),
        "D": None, "z": None, "initial_states": None, "cu_seqlens": None,
    }  # fmt: skip
    if D:
        found["D"] = draw.standard_normal((H, P) if D == 2 else H).astype(np.float32)
    if z:
        found["z"] = normal(B, T, H, P)
    if packed:
        found["cu_seqlens"] = np.cumsum([0, *lengths]).astype(np.int32)
    if initial:
        n_seq = len(lengths) if packed else B
        found["initial_states"] = draw.standard_normal((n_seq, H, P, N)).astype(np.float32)
    return found


def run(
    given: dict[str, Any], *, chunk_size: int = 64, piece: int = 1, splits: int = 1, aligned: bool = False,
    intermediate: bool = False, pool: np.ndarray | None = None, slots: int = 0, dt_limit: tuple[float, float] = (0.0, math.inf),
    device: str = "cpu", heads: int = 1,
) -> dict[str, np.ndarray]:  # fmt: skip
    given = {name: to_torch(value, device) for name, value in given.items()}
    checked = {name: value for name, value in given.items() if value is not None}
    dims = contract.check_combined(
        {name: tuple(value.shape) for name, value in checked.items()},
        {name: str(value.dtype).removeprefix("torch.") for name, value in checked.items()},
        chunk_size=chunk_size, chunk_aligned=aligned,
    )  # fmt: skip
    # Poisoned, so that whatever is not written shows.
    y = torch.full((dims.B, dims.T, dims.H, dims.P), math.nan, dtype=given["x"].dtype, device=device)
    final = torch.full((slots or dims.N_seq, dims.H, dims.P, dims.N), math.nan, device=device)
    shape = (dims.B, dims.NC, dims.H, dims.P, dims.N)
    ends = torch.full(shape, math.nan, device=device) if intermediate else None
    config = {"CHUNKS_PER_PIECE": piece, "STATES_PER_PIECE": splits, "HEADS_PER_BLOCK": heads, "num_stages": 4}
    assert _fused.unsupported(dims, "bfloat16", 1, intermediate=intermediate) is None
    names = ("x", "dt", "A", "B", "C")
    _fused.run(
        call_key(tuple(given.values())), dims, config, *(given[name] for name in names),
        D=given["D"], z=given["z"], dt_bias=given["dt_bias"], dt_softplus=True, dt_limit=dt_limit,
        initial_states=given["initial_states"], cu_seqlens=given["cu_seqlens"], y=y, final=final,
        final_indices=to_torch(pool, device), intermediate=ends, chunk_aligned=aligned,
    )  # fmt: skip
    found = {"y": from_torch(y), "final": from_torch(final)}
    return found | {"intermediate": from_torch(ends)} if ends is not None else found


def expected(
    given: dict[str, Any], *, chunk_size: int = 64, intermediate: bool = False, **options: Any
) -> dict[str, np.ndarray]:
    names = ("x", "dt", "A", "B", "C")
    options = {name: value for name, value in given.items() if name not in names} | options
    results = oracle.mamba_chunk_scan_by_stages(
        *(given[name] for name in names), chunk_size=chunk_size, dt_softplus=True, return_intermediate_states=intermediate,
        **options,
    )  # fmt: skip
    return {name: np.asarray(result) for name, result in zip(("y", "final", "intermediate"), results, strict=False)}


def check(got: dict[str, np.ndarray], want: dict[str, np.ndarray], bound: float = 2e-5) -> None:
    for name, ref in want.items():
        found = got[name].astype(np.float64)
        live = ~np.isnan(ref)  # slots in which no chunk stands
        error = np.linalg.norm((found - ref)[live]) / max(np.linalg.norm(ref[live]), 1e-30)
        assert error < bound, (name, error)


@pytest.mark.parametrize("piece, splits", [(1, 1), (2, 1), (2, 2), (1000, 8)])
@pytest.mark.parametrize("packed", [False, True])
def test_against_the_oracle(packed: bool, piece: int, splits: int):
    given = arguments(LENGTHS, packed=True, pad=9, H=3) if packed else arguments((150,), B=2, H=4, G=2)
    got = run(given, piece=piece, splits=splits, intermediate=True)
    check(got, expected(given, intermediate=True))


@pytest.mark.parametrize("packed", [False, True])
def test_many_pieces_are_scanned(packed: bool):
    """More than eight states before the last piece: a kernel of its own, and no other bits."""
    lengths = (10 * 64 + 3, 70) if packed else (10 * 64 + 3,)
    given = arguments(lengths, packed=packed, H=1)
    got = run(given, piece=1)
    check(got, expected(given))


@pytest.mark.parametrize("dtype, bound", [("bfloat16", 6e-3), ("float16", 1e-3)])
def test_sixteen_bits(dtype: str, bound: float):
    given = arguments(LENGTHS, packed=True, dtype=dtype, P=24, N=20)
    check(run(given, piece=1), expected(given), bound)


@pytest.mark.parametrize("D", [0, 1, 2])
@pytest.mark.parametrize("plain", [False, True])
def test_options(D: int, plain: bool):
    given = arguments((80,), D=D, z=not plain, initial=not plain, slow=False)
    limit = (0.0, math.inf) if plain else (0.1, 0.5)
    check(run(given, dt_limit=limit), expected(given, dt_limit=limit))


def to_aligned(given: dict[str, Any], chunk_size: int) -> dict[str, Any]:
    """x, B and C with every sequence at a whole chunk, and NaN in the rows between."""
    x, bounds = given["x"], given["cu_seqlens"]
    T, packed = x.shape[1], bounds is not None
    bounds = bounds if packed else [0, T]
    rows = contract.chunks(T, chunk_size, len(bounds) - 1, packed) * chunk_size
    moved = dict(given)
    for name in ("x", "B", "C"):
        moved[name] = np.full((x.shape[0], rows, *given[name].shape[2:]), np.nan, x.dtype)
        for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
            first = (begin // chunk_size + n) * chunk_size
            moved[name][:, first : first + end - begin] = given[name][:, begin:end]
    return moved


@pytest.mark.parametrize("chunk_size", [16, 64, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_chunk_aligned(packed: bool, chunk_size: int):
    given = arguments(LENGTHS if packed else (100,), packed=packed, B=1 if packed else 2)
    got = run(to_aligned(given, chunk_size), chunk_size=chunk_size, aligned=True)
    check(got, expected(given, chunk_size=chunk_size))


@pytest.mark.parametrize("chunk_size", [64, 128, 256])
def test_intermediate_states_at_the_callers_chunks(chunk_size: int):
    given = arguments((300, 0, 128, 40), packed=True, H=1)
    got = run(given, chunk_size=chunk_size, piece=3, intermediate=True)
    check(got, expected(given, chunk_size=chunk_size, intermediate=True))


def test_short_chunks_have_no_intermediate_states():
    dims = contract.Dims(1, 64, 2, 1, 16, 16, 32, 2, 1, False, 64)
    assert "chunk_size=32" in str(_fused.unsupported(dims, "bfloat16", 0, intermediate=True))
    assert _fused.unsupported(dims, "bfloat16", 0) is None


def test_what_does_not_fit_registers_is_left_to_the_stages():
    dims = contract.Dims(1, 64, 2, 1, 64, 256, 64, 1, 1, False, 64)
    assert "dstate=256" in str(_fused.unsupported(dims, "bfloat16", 0))
    assert "float32" in str(_fused.unsupported(dims, "float32", 0))


def test_a_pool_is_written_at_its_slots_alone():
    given = arguments((70, 0, 5, 20), packed=True)
    want = expected(given)["final"]
    got = run(given, pool=np.array([3, 1, -1, 9], np.int32), slots=5)["final"]
    check({"final": got[[3, 1]]}, {"final": want[[0, 1]]})
    assert np.isnan(got[[0, 2, 4]]).all()


def test_what_others_hold_does_not_matter():
    given = arguments(LENGTHS, packed=True, pad=30)
    clean = run(given, piece=1)
    for sequence in (0, 3, 4):
        begin, end = given["cu_seqlens"][sequence : sequence + 2]
        dirty = dict(given)
        for name in ("x", "dt", "B", "C", "z"):
            dirty[name] = np.full_like(given[name], np.nan)
            dirty[name][:, begin:end] = given[name][:, begin:end]
        dirty["initial_states"] = np.full_like(given["initial_states"], np.inf)
        dirty["initial_states"][sequence] = given["initial_states"][sequence]
        got = run(dirty, piece=1)
        np.testing.assert_array_equal(got["y"][:, begin:end], clean["y"][:, begin:end])
        np.testing.assert_array_equal(got["final"][sequence], clean["final"][sequence])
        assert not got["y"][:, given["cu_seqlens"][-1] :].any()


def test_company_changes_no_bit():
    """One config: a sequence alone and the same one between others, also where the others make the scan a kernel."""
    given = arguments((64 * 3 + 7,), packed=True, H=1)
    alone = run(given, piece=1, splits=1)
    other = arguments((64 * 10,), packed=True, H=1, seed=1)
    both = {
        name: value
        if name in ("A", "D", "dt_bias")
        else np.concatenate([other[name], value], int(name != "initial_states"))
        for name, value in given.items()
        if name != "cu_seqlens"
    }
    both["cu_seqlens"] = np.array([0, 640, 640 + 199], np.int32)
    got = run(both, piece=1, splits=1)
    np.testing.assert_array_equal(got["y"][:, 640:], alone["y"])
    np.testing.assert_array_equal(got["final"][1], alone["final"][0])


@pytest.mark.parametrize("bounds", [(0, 0, 0), (0, 7, 7), (0, 500, 3), (-5, 60, 70), (40, 20, 70)])
def test_bounds_are_data(bounds: tuple[int, ...]):
    """Nothing outside the tensors is touched; rows of no sequence are zero where bounds are legal."""
    given = arguments((35, 35), packed=True, H=1)
    given["cu_seqlens"] = np.array(bounds, np.int32)
    got = run(given)
    if bounds[0] == 0 and bounds[2] >= bounds[1] and bounds[2] <= 70:
        check(got, expected(given))


def test_views_of_one_projection():
    given = arguments((70,), B=2, H=2, G=1)
    want = expected(given)
    wide = np.concatenate([given[name].reshape(2, 70, -1) for name in ("z", "x", "B", "C", "dt")], 2)
    first = 0
    held = torch.from_numpy(wide)
    for name in ("z", "x", "B", "C", "dt"):
        width = given[name].reshape(2, 70, -1).shape[2]
        given[name] = held[..., first : first + width].view(given[name].shape)
        first += width
    check(run(given), want)


def test_every_argument_a_kernel_takes_is_read():
    for name in MODULES:
        module = importlib.import_module(f"triton_ssm.ssd.{name}")
        for kernel, function in inspect.getmembers(module, lambda member: hasattr(member, "fn")):
            source = textwrap.dedent(inspect.getsource(function.fn))
            (definition,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
            nodes = [
                node for node in ast.walk(definition) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
            ]
            unread = {argument.arg for argument in definition.args.args} - {node.id for node in nodes}
            assert not unread, f"{kernel} never reads {sorted(unread)}"


def test_counts_key_no_compile():
    """Every integer that changes from call to call is one that Triton is told not to look at."""
    counts = {"n_tokens", "n_sequences", "n_final", "splits"}
    for name in MODULES:
        module = importlib.import_module(f"triton_ssm.ssd.{name}")
        for kernel, function in inspect.getmembers(module, lambda member: hasattr(member, "params")):
            for parameter in function.params if kernel.startswith("fused_") else ():
                counted = parameter.name in counts or "_per_" in parameter.name
                assert not counted or parameter.do_not_specialize, f"{kernel}: {parameter.name}"
