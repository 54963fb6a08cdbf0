# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
"""What compilers have got wrong in kernels like the gated delta rule's: whether this one does, and that ours are right.

Triton up to 3.7.0 on sm_90 is known for wrong results of three patterns, which our kernels avoid or are checked for here:

- a product whose left operand is the transposed accumulator of another (flash-linear-attention issue 640);
- a left operand that is computed in registers, in a pipelined loop, which may be overwritten while it is still read;
- chained products of [64,64] tiles by 4 warps (flash-linear-attention issues 984 and 988).

A pattern that this compiler gets wrong is an expected failure; one that it gets right is named in the warnings.
"""

import contextlib
import inspect
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import triton_ssm
from ssm_configs import override
from ssm_configs.contracts.gdn_segments import segment_chunks
from triton_ssm.gdn import _segments

from .cases_gdn import CHUNKED, GDN_STAGES
from .compare import against_oracle, error
from .inputs import Case, draw
from .operators import OPERATORS, oracle_results
from .runners import torch_runner

pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")
BT = 64
STEPS = 6


class CompilerReport(UserWarning):
    """What the compiler made of a pattern."""


# Each kernel takes x, y, z [STEPS,64,64] and writes out [64,64].


@triton.jit
def transposed_accumulator_kernel(x_ptr, y_ptr, z_ptr, out_ptr, steps, BT: tl.constexpr, STAGES: tl.constexpr):
    """out = Σ (x·y)^T·z"""
    i = tl.arange(0, BT)
    tile = i[:, None] * BT + i[None, :]
    out = tl.zeros((BT, BT), tl.float32)
    for s in tl.range(0, steps, num_stages=STAGES):
        x, y = tl.load(x_ptr + s * (BT * BT) + tile), tl.load(y_ptr + s * (BT * BT) + tile)
        z = tl.load(z_ptr + s * (BT * BT) + tile)
        out = tl.dot(tl.trans(tl.dot(x, y)).to(x.dtype), z, out)
    tl.store(out_ptr + tile, out)


@triton.jit
def register_operand_kernel(x_ptr, y_ptr, z_ptr, out_ptr, steps, BT: tl.constexpr, STAGES: tl.constexpr):
    """out = Σ (x·exp2(z))·y, elementwise within the brackets."""
    i = tl.arange(0, BT)
    tile = i[:, None] * BT + i[None, :]
    out = tl.zeros((BT, BT), tl.float32)
    for s in tl.range(0, steps, num_stages=STAGES):
        x, y = tl.load(x_ptr + s * (BT * BT) + tile), tl.load(y_ptr + s * (BT * BT) + tile)
        z = tl.load(z_ptr + s * (BT * BT) + tile)
        left = (x.to(tl.float32) * tl.exp2(z.to(tl.float32))).to(x.dtype)
        out = tl.dot(left, y, out)
    tl.store(out_ptr + tile, out)


@triton.jit
def chained_products_kernel(x_ptr, y_ptr, z_ptr, out_ptr, steps, BT: tl.constexpr, STAGES: tl.constexpr):
    """out = x·y' + (y'^T·x)^T, all of z[0] and of m = z[0]·tril(Σ x·y^T, -1)·z[0]: y' = m·x, summed over the steps."""
    i = tl.arange(0, BT)
    tile = i[:, None] * BT + i[None, :]
    m = tl.zeros((BT, BT), tl.float32)
    for s in tl.range(0, steps, num_stages=STAGES):
        x, y = tl.load(x_ptr + s * (BT * BT) + tile), tl.load(y_ptr + s * (BT * BT) + tile)
        m = tl.dot(x, tl.trans(y), m)
    z = tl.load(z_ptr + tile)
    m = tl.where(i[:, None] > i[None, :], m, 0.0).to(z.dtype)
    m = tl.dot(m, z).to(z.dtype)
    m = tl.dot(z, m).to(z.dtype)
    out = tl.zeros((BT, BT), tl.float32)
    for s in tl.range(0, steps, num_stages=STAGES):
        x = tl.load(x_ptr + s * (BT * BT) + tile)
        out += tl.dot(m, x) + tl.trans(tl.dot(tl.trans(x), m))
    tl.store(out_ptr + tile, out)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).double()


def transposed_accumulator(x, y, z):
    return (_rounded(x @ y).transpose(1, 2) @ z).sum(0)


def register_operand(x, y, z):
    return (_rounded(x * torch.exp2(z)) @ y).sum(0)


def chained_products(x, y, z):
    m = _rounded((x @ y.transpose(1, 2)).sum(0).tril(-1))
    m = _rounded(z[0] @ _rounded(m @ z[0]))
    return (m @ x + (x.transpose(1, 2) @ m).transpose(1, 2)).sum(0)


PATTERNS: dict[str, tuple[Any, Any]] = {
    "a transposed accumulator as the left operand": (transposed_accumulator_kernel, transposed_accumulator),
    "a left operand in registers, in a pipeline": (register_operand_kernel, register_operand),
    "chained products of 64 rows": (chained_products_kernel, chained_products),
}


def pattern_error(name: str, device: str, num_warps: int, num_stages: int) -> float:
    """Largest relative error of a few launches: a race is not wrong every time. NaN counts as infinite."""
    kernel, definition = PATTERNS[name]
    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(3, STEPS, BT, BT, generator=generator) / 8).to(torch.bfloat16)
    expected = definition(x.double(), y.double(), z.double()).numpy()
    tensors = [tensor.to(device) for tensor in (x, y, z)]
    found = []
    for _ in range(10 if device == "cuda" else 1):
        out = torch.full((BT, BT), float("nan"), device=device)
        kernel[(1,)](*tensors, out, STEPS, BT, num_stages, num_warps=num_warps)
        found.append(error(out.cpu().numpy(), expected).relative)
    return max(np.nan_to_num(found, nan=np.inf))


# Two roundings to bfloat16 of what is fp32 in one and fp64 in the other may fall to different sides.
_LIMIT = 2e-3


@pytest.mark.parametrize("name", PATTERNS)
def test_the_patterns_say_what_they_mean(name, interpret):
    """In the interpreter, so that on a GPU a wrong result is the compiler's."""
    if not interpret:
        pytest.skip("runs the interpreter")
    assert pattern_error(name, "cpu", 4, 2) < _LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("num_warps", [2, 4, 8])
@pytest.mark.parametrize("name", PATTERNS)
def test_what_this_compiler_makes_of(name, num_warps, num_stages):
    found = pattern_error(name, "cuda", num_warps, num_stages)
    says = f"{name}, {num_warps} warps, {num_stages} stages, Triton {triton.__version__}: error {found:.1e}"
    if not found < _LIMIT:
        pytest.xfail(f"miscompiled: {says}")
    warnings.warn(CompilerReport(f"compiled right: {says}"), stacklevel=1)


LENGTHS = (230, 0, 1, 140)


def case(op: str, dtype: str, state: str = "float32") -> Case:
    """Chunks of 64 of models' heads, long enough for three steps of every loop; decays so slow that chunks matter."""
    dims = {"B": 1, "T": sum(LENGTHS) + 20, "H_k": 2, "H_v": 4, "K": 128, "V": 128, "L": 64}
    options = {"lengths": LENGTHS, "tail": 20, "poison": True, "initial": True, "slow": True}
    if op == CHUNKED:
        options["l2norm"] = True
    return Case(op, "compiled", dims, dtype, state, options)


def check(drawn: Case) -> None:
    """Right, and the same bits every time."""
    arguments, keywords = draw(drawn)
    run = torch_runner(OPERATORS[drawn.op], None, interpret=False)
    expected = oracle_results(drawn, arguments, keywords)
    first = run(arguments, keywords)
    for comparison in against_oracle(drawn, arguments, keywords, first, expected):
        assert comparison.ok, comparison
    for _ in range(10):
        again = run(arguments, keywords)
        for name, result in first.items():
            meant = ~np.isnan(expected[name])  # slots without a chunk hold what was there
            assert result[meant].tobytes() == again[name][meant].tobytes(), f"{name}: not the same bits"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("num_warps", [2, 4, 8])
def test_the_whole_operator_stage_by_stage(num_warps, num_stages, dtype):
    if dtype == "float32" and (num_stages > 1 or num_warps < 8):
        pytest.skip("fp32 has no pipeline, and spills with fewer warps")
    narrow = {"BLOCK_SIZE_V": 16 if dtype == "float32" else 32, "num_stages": num_stages}
    with contextlib.ExitStack() as pinned:
        pinned.enter_context(override(CHUNKED, FUSED=False, kkt_num_warps=num_warps))
        pinned.enter_context(override("gdn_chunk_delta_h", num_warps=num_warps, **narrow))
        # Four warps are no legal config here: see its spec.
        pinned.enter_context(override("gdn_recompute_w_u", num_warps=8 if num_warps == 4 else num_warps))
        pinned.enter_context(override("gdn_chunk_o", num_warps=num_warps))
        check(case(CHUNKED, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_whole_operator_fused(heads, num_stages, dtype):
    with override(CHUNKED, FUSED=True, HEADS=heads, num_stages=num_stages):
        check(case(CHUNKED, dtype))


def drawn(B: int, T: int, H: tuple[int, int] = (2, 4), N: int = 128) -> list[torch.Tensor]:
    """q, k, v, g and beta."""
    generator = torch.Generator("cuda").manual_seed(0)
    widths = (H[0] * N, H[0] * N, H[1] * N, H[1], H[1])
    q, k, v, g, beta = (torch.randn(B, T, width, generator=generator, device="cuda") for width in widths)
    heads = [x.bfloat16().unflatten(2, (-1, N)) for x in (q, k, v)]
    return [*heads, -g.abs() / 10, beta.sigmoid()]


def fused(tensors: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with override(CHUNKED, FUSED=True):
        o, final = triton_ssm.chunk_gated_delta_rule(*tensors, use_qk_l2norm=True, return_final_state=True, **options)
    assert final is not None
    return o, final


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("before", [8, 3])
def test_fused_from_views_of_one_projection(before, B):
    """Read where they lie, or as copies, where that is no multiple of 16 bytes."""
    q, k, v, *gates = drawn(B, 150)
    parts = [x.flatten(2) for x in (q, k, v)]
    nothing = torch.full_like(parts[0][..., :before], math.nan)
    wide = torch.cat([nothing, *parts], 2)[..., before:]
    views = [x.unflatten(2, (-1, 128)) for x in wide.split([x.shape[2] for x in parts], 2)]
    for found, expected in zip(fused([*views, *gates]), fused([q, k, v, *gates]), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(2, 4), (32, 64)])  # one warpgroup a program, and two
def test_fused_reads_nothing_of_others(heads):
    """The tiles of a sequence's last chunk reach into the next sequence, the next batch row and what is nobody's."""
    bounds = torch.tensor([0, 70, 130, 131, 200], dtype=torch.int32, device="cuda")
    tensors = drawn(1, 220, heads)
    spoilt = [x.clone() for x in tensors]
    for x in spoilt:
        x[:, 70:130], x[:, 200:] = math.nan, math.nan
    (o, final), (bad_o, bad_final) = fused(tensors, cu_seqlens=bounds), fused(spoilt, cu_seqlens=bounds)
    rows, sequences = [*range(70), *range(130, 200)], [0, 2, 3]
    assert torch.equal(o[:, rows], bad_o[:, rows]) and torch.equal(final[sequences], bad_final[sequences])
    assert not bad_o[:, 200:].any()
    tensors = drawn(2, 70, heads)
    (o, final), _ = fused(tensors), [x[1].fill_(math.nan) for x in tensors]
    bad_o, bad_final = fused(tensors)
    assert torch.equal(o[0], bad_o[0]) and torch.equal(final[0], bad_final[0])


def in_segments_of(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many chunks, whatever the rule says."""
    monkeypatch.setattr(_segments, "segment_chunks", lambda *sizes: min(length, sizes[4]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize(("K", "V"), [(128, 128), (64, 128), (128, 64)])
def test_the_whole_operator_fused_in_segments(K, V, length, dtype, monkeypatch):
    """Of six chunks, with a tail."""
    in_segments_of(length, monkeypatch)
    # One length, one size: a replayed call knows of no other rule.
    dims = {"B": 2, "T": 320 + length, "H_k": 2, "H_v": 4, "K": K, "V": V, "L": 64}
    options = {"initial": True, "slow": True, "l2norm": True}
    with override(CHUNKED, FUSED=True):
        check(Case(CHUNKED, "compiled", dims, dtype, "float32", options))


@pytest.mark.gpu
@pytest.mark.parametrize("initial", [False, True])
def test_segments_of_the_rule_against_the_whole(initial, monkeypatch):
    """Also when calls are replayed."""
    tensors, T = drawn(1, 8000), 8000
    tensors[3] *= 1e-3  # or nothing of a segment is left in the next
    assert segment_chunks(1, 4, 128, 128, -(-T // BT)) < -(-T // BT)
    options: dict[str, Any] = {"initial_state": torch.randn(1, 4, 128, 128, device="cuda") if initial else None}
    found = [fused(tensors, **options) for _ in range(4)]
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))
    in_segments_of(T, monkeypatch)
    monkeypatch.setattr(triton_ssm, "chunk_gated_delta_rule", inspect.unwrap(triton_ssm.chunk_gated_delta_rule))
    for some, whole in zip(found[0], fused(tensors, **options), strict=True):
        assert error(some.float().cpu().numpy(), whole.double().cpu().numpy()).within(8e-3, 2e-2)
        assert not torch.equal(some, whole), "both came whole"


@pytest.mark.gpu
def test_segments_read_nothing_of_others(monkeypatch):
    in_segments_of(2, monkeypatch)
    tensors = drawn(2, 310)
    o, final = fused(tensors)
    for x in tensors:
        x[1] = math.nan
    bad_o, bad_final = fused(tensors)
    assert torch.equal(o[0], bad_o[0]) and torch.equal(final[0], bad_final[0])
    assert bad_o[1].isnan().all() and bad_final[1].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("num_warps", [2, 4, 8])
@pytest.mark.parametrize("op", GDN_STAGES)
def test_stages(op, num_warps, dtype):
    if op == "gdn.recompute_w_u" and num_warps == 4:
        pytest.skip("no legal config")
    with override(OPERATORS[op].table, num_warps=num_warps):
        check(case(op, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_heads_in_a_pipeline(heads, num_stages):
    with override("gdn_chunk_o", HEADS=heads, num_stages=num_stages, BLOCK_SIZE_V=64, num_warps=4):
        check(case("gdn.chunk_o", "bfloat16"))
