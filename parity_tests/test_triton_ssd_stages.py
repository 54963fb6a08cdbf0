"""`triton_ssm.ssd`'s five stages in the interpreter against the oracle, each fed with inputs of its own."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_ssm
from ssm_configs import override
from triton_ssm import ssd

from .compare import error
from .inputs import DTYPES
from .oracle import ssd as oracle
from .runners import from_torch, to_torch

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NaN and overflow are meant
]
STAGES = ("chunk_cumsum", "chunk_state", "state_passing", "bmm_chunk", "chunk_scan")
# max |got - ref| / max |ref|: fp32 arithmetic, or an operand rounded to 8 or 11 bits.
WORST = {"float32": 4e-6, "bfloat16": 1.2e-2, "float16": 2e-3}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new tensor starts as NaN, so that an element which a kernel forgets is seen."""
    empty = torch.empty

    def nan(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan)


def arguments(
    stage: str, lengths: tuple[int, ...] | None = None, *, B: int = 2, T: int = 37, H: int = 2, G: int = 1, P: int = 16,
    N: int = 16, L: int = 16, dtype: str = "float32", tail: int = 0, seed: int = 0, D: int = 1, z: bool = True,
    initial: bool = True, poison: bool = False,
) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
    """NumPy arguments of a stage; what stands where no token or chunk does is NaN if `poison`."""
    rng = np.random.default_rng(seed)
    keywords: dict[str, Any] = {}
    n_seq = B
    if lengths is not None:
        keywords["cu_seqlens"] = np.array([0, *itertools.accumulate(lengths)], np.int32)
        B, T, n_seq = 1, sum(lengths) + tail, len(lengths)
    NC = T // L + n_seq if lengths is not None else -(-T // L)

    def normal(*shape, dtype: Any = DTYPES[dtype]):
        values = rng.standard_normal(shape).astype(dtype)
        if poison and lengths is not None and shape[:2] == (1, T):
            values[:, sum(lengths) :] = np.nan
        return values

    A = -rng.uniform(0.1, 2, H).astype(np.float32)
    step, bias = normal(B, T, H), rng.standard_normal(H).astype(np.float32)
    if stage == "chunk_cumsum":
        return [step, A], keywords | {"chunk_size": L, "dt_bias": bias, "dt_softplus": True}
    a, dt = (np.array(value, np.float32) for value in oracle.chunk_cumsum(
        step, A, chunk_size=L, dt_bias=bias, dt_softplus=True, **keywords))  # fmt: skip
    if not poison:
        a, dt = np.nan_to_num(a), np.nan_to_num(dt)
    x, B_, C = normal(B, T, H, P), normal(B, T, G, N), normal(B, T, G, N)
    states = normal(B, NC, H, P, N, dtype=np.float32)
    if stage == "chunk_state":
        return [x, B_, dt, a], keywords
    if stage == "state_passing":
        if initial:
            keywords["initial_states"] = normal(n_seq, H, P, N)
        return [states, a], keywords
    if stage == "bmm_chunk":
        return [C, B_], keywords | {"chunk_size": L}
    if D:
        keywords["D"] = rng.standard_normal((H, P)[:D]).astype(np.float32)
    if z:
        keywords["z"] = normal(B, T, H, P)
    CB = oracle.bmm_chunk(C, B_, chunk_size=L, cu_seqlens=keywords.get("cu_seqlens")).astype(np.float32)
    return [CB, x, dt, a, C, states], keywords


def torch_arguments(stage: str, *given, **options) -> tuple[list[Any], dict[str, Any]]:
    positional, keywords = arguments(stage, *given, **options)
    return [to_torch(a, "cpu") for a in positional], {name: to_torch(value, "cpu") for name, value in keywords.items()}


def check(stage: str, positional: list[Any], keywords: dict[str, Any], dtype: str, **options: Any) -> None:
    returned = getattr(ssd, stage)(
        *(to_torch(value, "cpu") for value in positional),
        **{name: to_torch(value, "cpu") for name, value in (keywords | options).items()},
    )
    expected = getattr(oracle, stage)(*positional, **keywords)
    pairs = zip(returned, expected, strict=True) if isinstance(expected, tuple) else [(returned, expected)]
    rounded = dtype if stage in ("chunk_state", "chunk_scan") else "float32"
    if "state_dtype" in options:
        rounded = options["state_dtype"].name
    for got, want in pairs:
        meant = ~np.isnan(want)
        assert error(from_torch(got)[meant], want[meant]).worst <= WORST[rounded], (stage, dtype, rounded)
        if stage == "chunk_scan":  # rows without a token
            assert not from_torch(got)[~want.any(-1)].astype(np.float64).any()


PACKED = (17, 0, 16, 5, 0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, PACKED], ids=["dense", "packed"])
def test_against_the_oracle(stage, dtype, lengths):
    check(stage, *arguments(stage, lengths, dtype=dtype, H=4, G=2, tail=7, poison=True), dtype)


@pytest.mark.parametrize("stage", STAGES)
def test_odd_sizes_and_long_chunks(stage):
    """Neither headdim nor dstate a power of two, more of both than a block has, and several blocks to a chunk."""
    check(stage, *arguments(stage, None, B=1, T=70, H=3, G=3, P=40, N=72, L=64), "float32")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lengths", [(), (0, 0), (0, 3)])
def test_nothing_and_nearly_nothing(stage, lengths):
    check(stage, *arguments(stage, lengths, tail=2), "float32")
    check(stage, *arguments(stage, lengths, tail=0), "float32")
    check(stage, *arguments(stage, None, B=2, T=0), "float32")
    check(stage, *arguments(stage, None, B=0, T=20), "float32")


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float16"])
def test_states_are_stored_in_their_own_dtype(state_dtype):
    stage = "state_passing"
    check(stage, *arguments(stage, PACKED), "float32", state_dtype=DTYPES[state_dtype])
    check(stage, *arguments(stage, PACKED, initial=False), "float32", state_dtype=DTYPES[state_dtype])


@pytest.mark.parametrize("softplus", [False, True])
def test_the_limits_of_dt_clip_what_bias_and_softplus_made(softplus):
    positional, keywords = arguments("chunk_cumsum", PACKED)
    check("chunk_cumsum", positional, keywords | {"dt_limit": (0.2, 0.7), "dt_softplus": softplus}, "float32")
    check("chunk_cumsum", positional, {"chunk_size": 32, "cu_seqlens": keywords["cu_seqlens"]}, "float32")


def test_a_nan_step_is_not_clipped_away():
    dt = torch.ones(1, 16, 1)
    dt[0, 3] = float("nan")
    a, step = ssd.chunk_cumsum(dt, -torch.ones(1), chunk_size=16, dt_limit=(0.0, 1.0))
    assert step.isnan().sum() == 1 and a[..., 3:].isnan().all() and not a[..., :3].isnan().any()


BLOCKS: dict[str, dict[str, Any]] = {
    "chunk_cumsum": {"BLOCK_SIZE_H": 2, "BLOCK_SIZE_T": 16, "num_warps": 1},
    "chunk_state": {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 16, "num_warps": 1, "num_stages": 1},
    "state_passing": {"BLOCK_SIZE": 64, "num_warps": 1, "num_stages": 1},
    "bmm_chunk": {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 16, "num_warps": 1},
    "chunk_scan": {
        "BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 32, "BLOCK_SIZE_DSTATE": 16, "num_warps": 1, "num_stages": 1,
    },
}  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_drawn(data):
    stage = data.draw(st.sampled_from(STAGES))
    G = data.draw(st.sampled_from([1, 2]))
    options = {
        "H": G * data.draw(st.integers(1, 2)), "G": G, "P": data.draw(st.integers(1, 20)), "N": data.draw(st.integers(1, 20)),
        "L": data.draw(st.sampled_from([16, 32])), "dtype": data.draw(st.sampled_from(sorted(DTYPES))),
        "seed": data.draw(st.integers(0, 100)), "D": data.draw(st.integers(0, 2)), "z": data.draw(st.booleans()),
        "initial": data.draw(st.booleans()), "poison": True,
    }  # fmt: skip
    lengths = None
    if data.draw(st.booleans()):
        lengths = tuple(data.draw(st.lists(st.integers(0, 40), max_size=4)))
        options["tail"] = data.draw(st.integers(0, 20))
    else:
        options |= {"B": data.draw(st.integers(1, 2)), "T": data.draw(st.integers(0, 50))}
    if data.draw(st.booleans()):
        with override(f"ssd_{stage}", **BLOCKS[stage]):
            check(stage, *arguments(stage, lengths, **options), options["dtype"])
    else:
        check(stage, *arguments(stage, lengths, **options), options["dtype"])


@pytest.mark.parametrize("stage", STAGES)
def test_packing_changes_no_bit_of_a_sequence(stage):
    L, lengths = 16, (20, 0, 37, 9)
    positional, keywords = torch_arguments(stage, lengths, dtype="bfloat16", L=L)
    bounds = keywords.pop("cu_seqlens").tolist()
    packed = getattr(ssd, stage)(*positional, **keywords, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    packed_slots = sum(lengths) // L + len(lengths)
    assert packed_slots not in (2, L), "the shapes must tell the kinds of tensors apart"
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        slots = slice(begin // L + n, begin // L + n + -(-(end - begin) // L))

        def own(tensor, begin=begin, end=end, slots=slots, n=n):
            """The part of a tensor that belongs to this sequence."""
            if tensor.dim() < 3 or tensor.shape[0] not in (1, len(lengths)):
                return tensor
            if tensor.shape[0] == len(lengths):
                return tensor[n : n + 1]
            if tensor.dim() == 5:
                return tensor[:, slots]
            return tensor[:, :, slots] if tensor.shape[2] == packed_slots else tensor[:, begin:end]

        alone = getattr(ssd, stage)(
            *map(own, positional), **{k: own(v) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
        )
        results = zip(alone, packed, strict=True) if isinstance(packed, tuple) else [(alone, packed)]
        for one, whole in results:
            assert torch.equal(one, own(whole)), (stage, n)


@pytest.mark.parametrize("stage", ["chunk_cumsum", "chunk_state", "bmm_chunk", "chunk_scan"])
def test_views_of_one_projection(stage):
    """x, B, C, z and dt side by side in wider rows, as a layer's projection leaves them."""
    positional, keywords = torch_arguments(stage, PACKED, tail=3)
    expected = getattr(ssd, stage)(*positional, **keywords)
    T = sum(PACKED) + 3

    def widen(tensor):
        if not isinstance(tensor, torch.Tensor) or tensor.shape[:2] != (1, T):
            return tensor
        wide = torch.full((1, T, tensor[0, 0].numel() + 13), float("nan"), dtype=tensor.dtype)
        view = wide[:, :, 5 : 5 + tensor[0, 0].numel()].unflatten(2, tensor.shape[2:])
        view.copy_(tensor)
        return view

    got = getattr(ssd, stage)(*map(widen, positional), **{name: widen(value) for name, value in keywords.items()})
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def test_what_lies_otherwise_is_copied():
    positional, keywords = torch_arguments("chunk_scan", PACKED)
    expected = ssd.chunk_scan(*positional, **keywords)
    moved = [tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in positional]
    assert torch.equal(ssd.chunk_scan(*moved, **keywords), expected)


def test_out_is_used():
    positional, keywords = torch_arguments("chunk_scan", PACKED)
    out = torch.empty_like(positional[1])
    assert ssd.chunk_scan(*positional, **keywords, out=out) is out and not out.isnan().any()


def put(index, value):
    return lambda a, k: a.__setitem__(index, value(a[index]))


def give(**new):
    return lambda a, k: k.update({name: value(k.get(name)) for name, value in new.items()})


ERRORS = {
    "chunk_cumsum: rank": (put(0, lambda t: t[0]), ValueError, r"dt: expected rank 3 \[B, T, H\], got rank 2"),
    "chunk_cumsum: dtype": (put(0, lambda t: t.double()), TypeError, r"dt: expected dtype .* got float64"),
    "chunk_cumsum: A": (put(1, lambda t: t[1:]), ValueError, r"A: expected shape \(H=2,\), got \(1,\)"),
    "chunk_cumsum: no A": (put(1, lambda t: None), TypeError, r"A: expected a torch.Tensor, got NoneType"),
    "chunk_cumsum: bias": (give(dt_bias=lambda t: t[1:]), ValueError, r"dt_bias: expected shape \(H=2,\)"),
    "chunk_cumsum: chunk size": (give(chunk_size=lambda _: 24), ValueError, r"chunk_size: expected a power of two"),
    "chunk_cumsum: chunk size type": (give(chunk_size=lambda _: 16.0), TypeError, r"chunk_size: expected an int, got float"),
    "chunk_cumsum: softplus": (give(dt_softplus=lambda _: 1), TypeError, r"dt_softplus: expected a bool, got int"),
    "chunk_cumsum: limit": (give(dt_limit=lambda _: (1.0, 0.5)), ValueError, r"dt_limit: expected 0 <= low <= high"),
    "chunk_cumsum: limit type": (give(dt_limit=lambda _: 1.0), TypeError, r"dt_limit: expected a pair of numbers"),
    "chunk_cumsum: batch": (
        put(0, lambda t: t.expand(2, -1, -1)), ValueError, r"dt: expected B=1 with cu_seqlens, got \(2,"),
    "chunk_cumsum: bounds": (
        give(cu_seqlens=lambda t: t.flip(0)), ValueError, r"cu_seqlens: expected 0 <= … <= T=38 without a descent"),
    "chunk_state: x": (put(0, lambda t: t[..., 0]), ValueError, r"x: expected rank 4 \[B, T, H, P\], got rank 3"),
    "chunk_state: B dtype": (put(1, lambda t: t.half()), TypeError, r"B: expected the dtype of x, float32, got float16"),
    "chunk_state: B": (put(1, lambda t: t[:, 1:]), ValueError, r"B: expected shape \(B=1, T=38, G=1, N=16\)"),
    "chunk_state: groups": (put(1, lambda t: t.expand(-1, -1, 3, -1)), ValueError, r"B: expected G to divide H=2, got G=3"),
    "chunk_state: dt dtype": (put(2, lambda t: t.half()), TypeError, r"dt: expected dtype float32, got float16"),
    "chunk_state: dA_cumsum": (put(3, lambda t: t[:, :, 1:]), ValueError, r"dA_cumsum: expected shape \(B=1, H=2, NC=7,"),
    "chunk_state: precision": (give(precision=lambda _: "bf16"), ValueError, r"precision: expected 'ieee' or 'tf32', got"),
    "chunk_state: device": (put(1, lambda t: t.to("meta")), ValueError, r"B: expected device cpu, where the first argument is"),
    "state_passing: states dtype": (put(0, lambda t: t.half()), TypeError, r"states: expected dtype float32, got float16"),
    "state_passing: initial": (
        give(initial_states=lambda t: t[1:]), ValueError, r"initial_states: expected shape \(N_seq=5, H=2, P=16, N=16\)"),
    "state_passing: slots": (
        lambda a, k: a.__setitem__(slice(0, 2), [a[0][:, :3], a[1][:, :, :3]]),
        ValueError, r"states: expected a chunk slot for each of 5 sequences, got NC=3"),
    "state_passing: state dtype": (
        give(state_dtype=lambda _: torch.float64), TypeError, r"state_dtype: expected dtype .* got float64"),
    "state_passing: state dtype type": (
        give(state_dtype=lambda _: "float32"), TypeError, r"state_dtype: expected a torch.dtype, got str"),
    "bmm_chunk: B": (put(1, lambda t: t[..., 1:]), ValueError, r"B: expected shape \(B=1, T=38, G=1, N=16\)"),
    "bmm_chunk: B dtype": (put(1, lambda t: t.half()), TypeError, r"B: expected the dtype of C, float32, got float16"),
    "chunk_scan: CB": (put(0, lambda t: t[..., 1:]), ValueError, r"CB: expected shape \(B=1, NC=7, G=1, L=16,  L=16\)"),
    "chunk_scan: states": (put(5, lambda t: t[..., 1:]), ValueError, r"states: expected shape \(B=1, NC=7, H=2, P=16, N=16\)"),
    "chunk_scan: D": (give(D=lambda t: t[1:]), ValueError, r"D: expected shape \(H=2,\) or \(H=2, P=16\), got \(1,\)"),
    "chunk_scan: z": (give(z=lambda t: t.half()), TypeError, r"z: expected the dtype of x, float32, got float16"),
    "chunk_scan: out": (give(out=lambda _: torch.zeros(1, 3, 2, 16)), ValueError, r"out: expected shape \(1, 38, 2, 16\)"),
    "chunk_scan: out dtype": (
        give(out=lambda _: torch.zeros(1, 38, 2, 16).half()), TypeError, r"out: expected the dtype of x, float32"),
    "chunk_scan: out strides": (
        give(out=lambda _: torch.zeros(1, 2, 38, 16).transpose(1, 2)), ValueError, r"out: expected every row dense"),
    "chunk_scan: not a tensor": (put(1, lambda t: t.tolist()), TypeError, r"x: expected a torch.Tensor, got list"),
    "chunk_scan: gradient": (put(1, lambda t: t.requires_grad_()), RuntimeError, r"x: ssd.chunk_scan has no backward"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    stage, (spoil, kind, text) = name.partition(":")[0], ERRORS[name]
    positional, keywords = torch_arguments(stage, PACKED)
    spoil(positional, keywords)
    with pytest.raises(kind, match=text):
        getattr(ssd, stage)(*positional, **keywords)


@pytest.mark.parametrize("stage", STAGES)
def test_explain_takes_the_call(stage):
    positional, keywords = torch_arguments(stage, PACKED)
    told = str(triton_ssm.explain(f"ssd.{stage}", *positional, **keywords))
    assert f"ssd_{stage} [triton]" in told and "heuristic" in told
