"""`triton_ssm.mamba_chunk_scan_combined` on its five stages in the interpreter: every option, drawn shapes, every error."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_ssm
from ssm_configs import override

from .cases import Case, select
from .compare import against_oracle
from .inputs import DTYPES, draw
from .operators import OPERATORS, oracle_results
from .runners import to_torch, torch_runner

OP = "mamba_chunk_scan_combined"
pytestmark = [
    pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NaN and overflow are meant
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new tensor starts as NaN, so that an element which a kernel forgets is seen."""
    empty = torch.empty

    def nan(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan)


@pytest.fixture(autouse=True)
def five_stages():
    with override(OP, FUSED=False):
        yield


def check(case: Case, seed: int = 0, few: bool = False, **more: Any) -> None:
    """`few`: so few elements that one unlucky rounding is the whole relative error, not an average over many."""
    arguments, keywords = draw(case, seed)
    keywords |= more
    result = torch_runner(OPERATORS[OP], None, interpret=True)(arguments, keywords)
    for comparison in against_oracle(case, arguments, keywords, result, oracle_results(case, arguments, keywords)):
        worst = comparison.error.within(comparison.worst, comparison.worst)
        assert comparison.ok or (few and not comparison.note and worst), (comparison, case)


@pytest.mark.parametrize("case", select(op=OP, tags=("ci",)), ids=str)
def test_registry(case: Case):
    check(case)


@pytest.mark.parametrize("chunk_size", [512, 2048])
def test_long_chunks_are_cut_and_the_states_are_the_callers(chunk_size):
    dims = {"B": 1, "T": 840, "H": 1, "G": 1, "P": 16, "N": 16, "L": chunk_size}
    options = {"lengths": (560, 0, 270), "tail": 10, "return_intermediate_states": True, "slow": True, "initial": True}
    with (  # few blocks, for the interpreter
        override("ssd_chunk_scan", BLOCK_SIZE_M=128, BLOCK_SIZE_K=128),
        override("ssd_bmm_chunk", BLOCK_SIZE_M=128, BLOCK_SIZE_N=128),
    ):
        check(Case(OP, "long chunks, aligned", dims, options=options | {"chunk_aligned": True}))
        check(Case(OP, "long chunks, dense", dims, options={"return_intermediate_states": True, "slow": True}))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_drawn(data):
    G = data.draw(st.sampled_from([1, 2]))
    dims = {
        "B": 1, "H": G * data.draw(st.integers(1, 2)), "G": G, "P": data.draw(st.integers(1, 20)),
        "N": data.draw(st.integers(1, 20)), "L": data.draw(st.sampled_from([16, 32])),
    }  # fmt: skip
    names = ("D", "D_per_headdim", "z", "initial", "slow", "return_intermediate_states", "chunk_aligned", "dt_softplus")
    options: dict[str, Any] = {name: data.draw(st.booleans()) for name in names}
    if data.draw(st.booleans()):
        lengths = tuple(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4)))
        options |= {"lengths": lengths, "tail": data.draw(st.integers(0, 20)), "poison": True}
        dims["T"] = sum(lengths) + options["tail"]
    else:
        dims |= {"B": data.draw(st.integers(1, 2)), "T": data.draw(st.integers(0, 50))}
    if not options["chunk_aligned"]:
        del options["chunk_aligned"]
    dtypes = [data.draw(st.sampled_from(sorted(DTYPES))) for _ in range(2)]
    check(Case(OP, "drawn", dims, *dtypes, options=options), data.draw(st.integers(0, 100)), few=True)


def prompt(dtype: str = "bfloat16", seed: int = 0, T: int = 45, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    options = {"D": True, "z": True, "slow": True} | options
    if "lengths" in options:
        T = sum(options["lengths"]) + options.get("tail", 0)
    dims = {"B": 1, "T": T, "H": 4, "G": 2, "P": 16, "N": 16, "L": 16}
    positional, keywords = draw(Case(OP, "small", dims, dtype, options=options), seed)
    return [to_torch(a, "cpu") for a in positional], {name: to_torch(value, "cpu") for name, value in keywords.items()}


def rows(arguments: list[Any], keywords: dict[str, Any], part: slice) -> tuple[list[Any], dict[str, Any]]:
    """The tokens `part` of a call."""
    x, dt, A, B, C = arguments
    own = {"z": keywords["z"][:, part]} if "z" in keywords else {}
    return [x[:, part], dt[:, part], A, B[:, part], C[:, part]], keywords | own


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("cut", [16, 32])
def test_a_prompt_split_after_any_chunk_resumes_bit_for_bit(dtype, cut):
    arguments, keywords = prompt(dtype)
    whole, final = triton_ssm.mamba_chunk_scan_combined(*arguments, **keywords)
    positional, named = rows(arguments, keywords, slice(0, cut))
    first, state = triton_ssm.mamba_chunk_scan_combined(*positional, **named)
    (x, dt, A, B, C), named = rows(arguments, keywords, slice(cut, None))
    second, end = triton_ssm.mamba_chunk_scan_combined(x, dt, A, B, C, **named, initial_states=state)
    assert torch.equal(torch.cat([first, second], 1), whole) and torch.equal(end, final)
    # the same among others, with tokens after it that belong to nobody
    tokens = slice(5, 5 + x.shape[1])
    x, dt, B, C, z = (torch.cat([t[:, :5] * 3, t, t[:, :9] * 2], 1) for t in (x, dt, B, C, named["z"]))
    packed, ends = triton_ssm.mamba_chunk_scan_combined(
        x, dt, A, B, C, **{**named, "z": z}, cu_seqlens=torch.tensor([0, 5, 5, tokens.stop]),
        initial_states=torch.cat([final * 2, final * 3, state]),
    )  # fmt: skip
    assert torch.equal(packed[:, tokens], second) and not packed[:, tokens.stop :].any()
    assert torch.equal(ends[2:], final) and torch.equal(ends[1:2], final * 3)


def test_packing_changes_no_bit_of_a_sequence():
    lengths = (20, 0, 37, 9)
    arguments, keywords = prompt(lengths=lengths, tail=6, initial=True, return_intermediate_states=True)
    bounds, initial = keywords.pop("cu_seqlens").tolist(), keywords.pop("initial_states")
    packed = triton_ssm.mamba_chunk_scan_combined(
        *arguments, **keywords, cu_seqlens=torch.tensor(bounds), initial_states=initial
    )
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        positional, named = rows(arguments, keywords, slice(begin, end))
        y, final, after = triton_ssm.mamba_chunk_scan_combined(*positional, **named, initial_states=initial[n : n + 1])
        slot = begin // 16 + n
        assert torch.equal(y, packed[0][:, begin:end]) and torch.equal(final[0], packed[1][n])
        assert torch.equal(after, packed[2][:, slot : slot + after.shape[1]])


def test_nothing_of_a_sequence_reaches_another():
    """One sequence, its state and the padding hold NaN and infinities; the others do not notice."""
    lengths = (20, 18, 37)
    arguments, keywords = prompt(lengths=lengths, tail=6, initial=True, return_intermediate_states=True)
    expected = triton_ssm.mamba_chunk_scan_combined(*arguments, **keywords)
    bounds = keywords["cu_seqlens"].tolist()
    for n in range(3):
        own = [t.clone() for t in arguments]
        named = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
        for tensor in (own[0], own[1], own[3], own[4], named["z"]):
            tensor[:, bounds[n] : bounds[n + 1] : 2] = float("nan")
            tensor[:, bounds[n] + 1 : bounds[n + 1] : 2] = float("inf")
            tensor[:, bounds[-1] :] = float("nan")
        named["initial_states"][n] = float("nan")
        y, final, after = triton_ssm.mamba_chunk_scan_combined(*own, **named)
        assert y[:, bounds[n] : bounds[n + 1]].isnan().any() and final[n].isnan().any()
        for other in {0, 1, 2} - {n}:
            tokens = slice(bounds[other], bounds[other + 1])
            slots = slice(bounds[other] // 16 + other, bounds[other] // 16 + other - (-lengths[other] // 16))
            assert torch.equal(y[:, tokens], expected[0][:, tokens]) and torch.equal(final[other], expected[1][other])
            assert torch.equal(after[:, slots], expected[2][:, slots])
        assert not y[:, bounds[-1] :].any()


def test_chunk_aligned_rows_give_the_same_bits():
    arguments, keywords = prompt(lengths=(20, 0, 18), tail=5, initial=True)
    expected = triton_ssm.mamba_chunk_scan_combined(*arguments, **keywords)
    x, dt, A, B, C = arguments
    bounds = keywords["cu_seqlens"]
    x, B, C = (triton_ssm.layouts.to_chunk_aligned(t, chunk_size=16, cu_seqlens=bounds) for t in (x, B, C))
    got = triton_ssm.mamba_chunk_scan_combined(x, dt, A, B, C, **keywords, chunk_aligned=True)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16])
def test_a_pool_takes_the_last_states(state_dtype):
    arguments, keywords = prompt(lengths=(20, 0, 18, 3))
    _, final = triton_ssm.mamba_chunk_scan_combined(*arguments, **keywords, state_dtype=state_dtype)
    assert final.dtype == state_dtype
    wide = torch.full((6, 3, *final.shape[1:]), 7, dtype=state_dtype)
    pool = wide[:, 1]
    keywords["return_final_states"] = False
    slots = torch.tensor([4, 0, -1, 2])
    _, same = triton_ssm.mamba_chunk_scan_combined(
        *arguments, **keywords, final_states_out=pool, final_state_indices=slots
    )
    assert same is pool
    for slot in range(6):
        n = slots.tolist().index(slot) if slot in slots else None
        assert torch.equal(pool[slot], torch.full_like(pool[slot], 7) if n is None else final[n])
    assert (wide[:, 0] == 7).all() and (wide[:, 2] == 7).all()
    triton_ssm.mamba_chunk_scan_combined(*arguments, **keywords, final_states_out=pool)
    assert torch.equal(pool[:4], final) and (pool[5] == 7).all()


def test_what_is_returned():
    arguments, keywords = prompt(T=20)
    keywords["return_final_states"] = False
    y, final = triton_ssm.mamba_chunk_scan_combined(*arguments, **keywords)
    assert final is None
    out = torch.empty_like(y)
    again, none, after = triton_ssm.mamba_chunk_scan_combined(
        *arguments, **keywords, return_intermediate_states=True, out=out, state_dtype=torch.bfloat16
    )
    assert again is out and torch.equal(out, y) and none is None
    assert after.shape == (1, 2, 4, 16, 16) and after.dtype == torch.bfloat16


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_no_tokens(lengths):
    arguments, keywords = prompt(lengths=lengths, tail=3, initial=True)
    y, final = triton_ssm.mamba_chunk_scan_combined(*arguments, **keywords)
    assert not y.any() and torch.equal(final, keywords["initial_states"].float())
    arguments, keywords = prompt(lengths=lengths)
    y, final = triton_ssm.mamba_chunk_scan_combined(*arguments, **keywords)
    assert y.shape[1] == 0 and final.shape[0] == len(lengths) and not final.any()
    arguments, keywords = prompt(T=0)
    y, final = triton_ssm.mamba_chunk_scan_combined(*arguments, **keywords)
    assert y.shape[1] == 0 and final.shape[0] == 1 and not final.any()
    batch = [t.expand(0, *t.shape[1:]) if t.dim() > 1 else t for t in arguments]
    y, final = triton_ssm.mamba_chunk_scan_combined(*batch, **keywords | {"z": None})
    assert y.shape[0] == 0 and final.shape[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_a_sequence_there_may_be_fewer_aligned_rows_than_tokens(dtype):
    """16-bit inputs take the fused path."""
    x, B, C = (torch.ones(1, 0, *shape, dtype=dtype) for shape in ((2, 16), (1, 16), (1, 16)))
    y, final = triton_ssm.mamba_chunk_scan_combined(
        x, torch.ones(1, 70, 2), -torch.ones(2), B, C, chunk_size=128, chunk_aligned=True,
        cu_seqlens=torch.zeros(1, dtype=torch.int32), return_final_states=True,
    )  # fmt: skip
    assert y.shape == (1, 70, 2, 16) and not y.any() and final.shape == (0, 2, 16, 16)


def put(index, value):
    return lambda a, k: a.__setitem__(index, value(a[index]))


def give(**new):
    return lambda a, k: k.update({name: value(k.get(name)) for name, value in new.items()})


POOL = torch.zeros(4, 4, 16, 16)
ERRORS = {
    "x rank": (put(0, lambda t: t[0]), ValueError, r"x: expected rank 4 \[B, T, H, P\], got rank 3"),
    "x dtype": (put(0, lambda t: t.double()), TypeError, r"x: expected dtype .* got float64"),
    "x rows": (put(0, lambda t: t[:, 1:]), ValueError, r"x: expected shape \(B=1, T=38, H=4, P=16\)"),
    "aligned rows": (give(chunk_aligned=lambda _: True), ValueError, r"x: expected shape \(B=1, chunk_size x NC=64,"),
    "dt": (put(1, lambda t: t[..., 1:]), ValueError, r"dt: expected shape \(B=1, T=38, H=4\)"),
    "A": (put(2, lambda t: t[1:]), ValueError, r"A: expected shape \(H=4,\), got \(3,\)"),
    "B dtype": (put(3, lambda t: t.half()), TypeError, r"B: expected the dtype of x, bfloat16, got float16"),
    "C": (put(4, lambda t: t[..., 1:]), ValueError, r"C: expected shape \(B=1, T=38, G=2, N=16\)"),
    "C missing": (put(4, lambda t: None), TypeError, r"C: expected a torch.Tensor, got NoneType"),
    "groups": (
        lambda a, k: a.__setitem__(slice(3, 5), [t[:, :, :1].expand(-1, -1, 3, -1) for t in a[3:]]),
        ValueError, r"B: expected G to divide H=4, got G=3"),
    "chunk size": (give(chunk_size=lambda _: 8), ValueError, r"chunk_size: expected a power of two from 16 to 2048, got 8"),
    "chunk size type": (give(chunk_size=lambda _: [16]), TypeError, r"chunk_size: expected an int, got list"),
    "D": (give(D=lambda t: t[1:]), ValueError, r"D: expected shape \(H=4,\) or \(H=4, P=16\), got \(3,\)"),
    "z": (give(z=lambda t: t[:, 1:]), ValueError, r"z: expected shape \(B=1, T=38, H=4, P=16\)"),
    "dt_bias": (give(dt_bias=lambda t: t[1:]), ValueError, r"dt_bias: expected shape \(H=4,\)"),
    "dt_softplus": (give(dt_softplus=lambda _: 1), TypeError, r"dt_softplus: expected a bool, got int"),
    "dt_limit": (give(dt_limit=lambda _: [2.0, 1.0]), ValueError, r"dt_limit: expected 0 <= low <= high"),
    "initial_states": (give(initial_states=lambda _: POOL), ValueError, r"initial_states: expected shape \(N_seq=2, H=4,"),
    "cu_seqlens dtype": (give(cu_seqlens=lambda t: t.float()), TypeError, r"cu_seqlens: expected dtype int32 or int64"),
    "cu_seqlens": (give(cu_seqlens=lambda t: t + 1), ValueError, r"cu_seqlens: expected 0 <= … <= T=38"),
    "state_dtype": (give(state_dtype=lambda _: torch.int32), TypeError, r"state_dtype: expected dtype .* got int32"),
    "return_final_states": (give(return_final_states=lambda _: None), TypeError, r"return_final_states: expected a bool"),
    "return_intermediate_states": (
        give(return_intermediate_states=lambda _: 1), TypeError, r"return_intermediate_states: expected a bool, got int"),
    "chunk_aligned": (give(chunk_aligned=lambda _: 0), TypeError, r"chunk_aligned: expected a bool, got int"),
    "precision": (give(precision=lambda _: []), ValueError, r"precision: expected 'ieee' or 'tf32', got \[\]"),
    "pool shape": (give(final_states_out=lambda _: POOL[:, 1:]), ValueError, r"final_states_out: expected shape \(S=4, H=4,"),
    "pool slots": (give(final_states_out=lambda _: POOL[:1]), ValueError, r"final_states_out: expected a slot for each of 2"),
    "pool strides": (
        give(final_states_out=lambda _: POOL.mT), ValueError, r"final_states_out: expected strides \(any, 256, 16, 1\)"),
    "pool overlap": (
        give(final_states_out=lambda _: POOL[:1].expand(3, -1, -1, -1)),
        ValueError, r"final_states_out: expected slots that do not overlap"),
    "pool indices": (
        give(final_states_out=lambda _: POOL, final_state_indices=lambda _: torch.tensor([1])),
        ValueError, r"final_state_indices: expected shape \(N_seq=2,\)"),
    "pool slot": (
        give(final_states_out=lambda _: POOL, final_state_indices=lambda _: torch.tensor([1, 4])),
        ValueError, r"final_state_indices: expected slots < S=4, got 4"),
    "indices alone": (
        give(final_state_indices=lambda _: torch.tensor([0, 1])), ValueError, r"final_state_indices: expected None without"),
    "device": (give(z=lambda t: t.to("meta")), ValueError, r"z: expected device cpu, where the first argument is, got meta"),
    "out": (give(out=lambda _: torch.zeros(1, 38, 4, 8)), TypeError, r"out: expected the dtype of x, bfloat16"),
    "gradient": (give(D=lambda t: t.requires_grad_()), RuntimeError, r"D: mamba_chunk_scan_combined has no backward"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_and_touch_nothing(name):
    spoil, kind, text = ERRORS[name]
    arguments, keywords = prompt(lengths=(20, 18))
    spoil(arguments, keywords)
    with pytest.raises(kind, match=text):
        triton_ssm.mamba_chunk_scan_combined(*arguments, **keywords)
    assert not POOL.any()


def test_a_gradient_that_is_not_wanted_is_no_error():
    arguments, keywords = prompt(T=20)
    arguments[0].requires_grad_()
    with torch.no_grad():
        triton_ssm.mamba_chunk_scan_combined(*arguments, **keywords)


def test_explain_tells_the_path():
    arguments, keywords = prompt()
    told = str(triton_ssm.explain(OP, *arguments, **keywords))
    assert "nheads=4, headdim=16, dstate=16, bfloat16, size 45" in told and "the five stages: FUSED=False" in told
    with pytest.raises(TypeError, match="mamba_chunk_scan_combined has no argument 'seq_idx'"):
        triton_ssm.explain(OP, *arguments, **keywords, seq_idx=None)
