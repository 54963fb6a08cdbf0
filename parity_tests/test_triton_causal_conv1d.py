"""`triton_ssm`'s convolutions in the interpreter against the oracle: every option, drawn shapes, every error."""

import ast
import inspect
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_ssm
from ssm_configs import override
from triton_ssm import _causal_conv1d_kernel, _causal_conv1d_update_kernel, _causal_conv1d_window

from .cases import Case, select
from .compare import against_oracle
from .inputs import DTYPES, draw
from .operators import OPERATORS, oracle_results
from .runners import from_torch, to_torch, torch_runner

PREFILL, UPDATE = "causal_conv1d", "causal_conv1d_update"
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch):
    """Every new tensor starts as NaN, so that an element which a kernel forgets is seen."""
    empty = torch.empty

    def nan(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan)


def check(case: Case, seed: int = 0, few: bool = False) -> None:
    """`few`: so few elements that one unlucky rounding is the whole relative error, not an average over many."""
    arguments, keywords = draw(case, seed)
    result = torch_runner(OPERATORS[case.op], None, interpret=True)(arguments, keywords)
    for comparison in against_oracle(case, arguments, keywords, result, oracle_results(case, arguments, keywords)):
        worst = comparison.error.within(comparison.worst, comparison.worst)
        assert comparison.ok or (few and not comparison.note and worst), (comparison, case)


@pytest.mark.parametrize(
    "case", [*select(op=PREFILL, tags=("ci",)), *select(op=UPDATE, tags=("ci",))], ids=lambda case: f"{case.op}: {case}"
)
def test_registry(case: Case):
    check(case)


DRAWN = {
    "bias": st.booleans(),
    "activation": st.sampled_from([None, "silu", "swish"]),
    "tail": st.integers(0, 3),
    "spare_rows": st.integers(0, 3),
}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_drawn_prompts(data):
    options = data.draw(st.fixed_dictionaries(DRAWN))
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 12))
    if data.draw(st.booleans()):
        lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
        state = data.draw(st.sampled_from(["none", "initial", "pool", "padding"]))
        options |= {"lengths": tuple(lengths), "pool": state in ("pool", "padding"), "padding": state == "padding"}
        options["initial"] = state == "initial"
        B, T = 1, sum(lengths) + options["tail"]
    D = data.draw(st.integers(1, 40))
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, D - 1))
        options["sizes"] = (cut, D - cut) if cut else (D,)
        if data.draw(st.booleans()):
            options["chunk_size"] = data.draw(st.sampled_from([16, 32]))
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    case = Case(PREFILL, "drawn", {"B": B, "T": T, "D": D, "W": data.draw(st.integers(2, 6))}, dtype, dtype, options)
    with override(PREFILL, BLOCK_SIZE_T=data.draw(st.sampled_from([1, 8, 16])), BLOCK_SIZE_D=16, num_warps=1):
        check(case, data.draw(st.integers(0, 100)), few=True)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_drawn_updates(data):
    options = data.draw(st.fixed_dictionaries({**DRAWN, "slots": st.booleans(), "padding": st.booleans()}))
    options["slots"] |= options["padding"]
    B, W = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 6))
    if data.draw(st.booleans()):
        options["lengths"] = tuple(data.draw(st.lists(st.integers(0, 5), min_size=B, max_size=B)))
    options["spec"] = data.draw(st.booleans())
    dims = {"S": B + 3, "L": W - 1 + options["spare_rows"], "B": B, "D": data.draw(st.integers(1, 40)), "W": W}
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    with override(UPDATE, BLOCK_SIZE_D=16, BLOCK_SIZE_B=data.draw(st.sampled_from([1, 2, 4])), num_warps=1):
        check(Case(UPDATE, "drawn", dims, dtype, dtype, options), data.draw(st.integers(0, 100)), few=True)


def prompt(**options) -> tuple[list[Any], dict[str, Any]]:
    options = {"bias": True, "activation": "silu", "lengths": (9, 4), "pool": True} | options
    case = Case(PREFILL, "small", {"B": 1, "T": 13, "D": 32, "W": 4}, options=options)
    arguments, keywords = draw(case)
    return [to_torch(a, "cpu") for a in arguments], {name: to_torch(value, "cpu") for name, value in keywords.items()}


def step(**options) -> tuple[list[Any], dict[str, Any]]:
    options = {"bias": True, "activation": "silu", "slots": True} | options
    case = Case(UPDATE, "small", {"S": 6, "L": 3, "B": 3, "D": 32, "W": 4}, options=options)
    arguments, keywords = draw(case)
    return [to_torch(a, "cpu") for a in arguments], {name: to_torch(value, "cpu") for name, value in keywords.items()}


def test_packing_changes_no_bit_of_a_sequence():
    (x, weight), keywords = prompt(pool=False, initial=True, lengths=(9, 4))
    initial = keywords.pop("initial_state")
    del keywords["cu_seqlens"]
    packed, final = triton_ssm.causal_conv1d(
        x, weight, **keywords, initial_state=initial, cu_seqlens=torch.tensor([0, 9, 13], dtype=torch.int32)
    )
    for n, rows in enumerate((slice(0, 9), slice(9, 13))):
        alone, one = triton_ssm.causal_conv1d(x[:, rows], weight, **keywords, initial_state=initial[n : n + 1])
        assert torch.equal(alone[0], packed[0, rows]) and torch.equal(one[0], final[n])


def test_a_prompt_split_anywhere_gives_the_same_bits():
    (x, weight), keywords = prompt(pool=False)
    del keywords["cu_seqlens"]
    whole, final = triton_ssm.causal_conv1d(x, weight, **keywords)
    for cut in range(x.shape[1] + 1):
        first, state = triton_ssm.causal_conv1d(x[:, :cut], weight, **keywords)
        second, state = triton_ssm.causal_conv1d(x[:, cut:], weight, **keywords, initial_state=state)
        assert torch.equal(torch.cat([first, second], 1), whole) and torch.equal(state, final)


def test_updates_continue_a_prompt():
    (x, weight), keywords = prompt(pool=False)
    del keywords["cu_seqlens"]
    whole, final = triton_ssm.causal_conv1d(x, weight, **keywords)
    _, state = triton_ssm.causal_conv1d(x[:, :5], weight, **keywords)
    for t in range(5, x.shape[1]):
        y = triton_ssm.causal_conv1d_update(x[:, t], state, weight, **keywords)
        assert torch.equal(y[0], whole[0, t])
    assert torch.equal(state, final)


def test_views_into_larger_buffers():
    (x, weight), keywords = prompt()
    copy = {name: value.clone() if name == "conv_state" else value for name, value in keywords.items()}
    expected, state = triton_ssm.causal_conv1d(x, weight, **copy)
    wide = torch.full((1, x.shape[1], 50), float("nan"), dtype=x.dtype)
    wide[:, :, 7:39] = x
    pool = torch.full((*keywords["conv_state"].shape[:2], 3, 32), 7, dtype=x.dtype)
    pool[:, :, 1] = keywords["conv_state"]
    keywords["conv_state"] = pool[:, :, 1]
    y, _ = triton_ssm.causal_conv1d(wide[:, :, 7:39], weight, **keywords)
    assert torch.equal(y, expected) and torch.equal(pool[:, :, 1], state)
    assert (pool[:, :, 0] == 7).all() and (pool[:, :, 2] == 7).all()


def test_explain_takes_the_call_and_says_what_it_would_launch():
    arguments, keywords = prompt()
    assert "width=4, bfloat16, size 416" in str(triton_ssm.explain(PREFILL, *arguments, **keywords))
    split = triton_ssm.explain("causal_conv1d_split", *arguments, (16, 16), chunk_size=16, **keywords)
    assert split.config == triton_ssm.explain(PREFILL, *arguments, **keywords).config
    arguments, keywords = step()
    assert "width=4, bfloat16, size 96" in str(triton_ssm.explain(UPDATE, *arguments, **keywords))


def test_out_is_used():
    (x, weight), keywords = prompt()
    out = torch.empty_like(x)
    y, _ = triton_ssm.causal_conv1d(x, weight, **keywords, out=out)
    assert y is out and not out.isnan().any()
    (x, state, weight), keywords = step()
    out = torch.empty(3, 2, 32, dtype=x.dtype)[:, 1]
    assert triton_ssm.causal_conv1d_update(x, state, weight, **keywords, out=out) is out and not out.isnan().any()


def put(index, value):
    return lambda a, k: a.__setitem__(index, value(a[index]))


def give(**new):
    return lambda a, k: k.update({name: value(k.get(name)) for name, value in new.items()})


PROMPT_ERRORS = {
    "x rank": (put(0, lambda x: x[0]), ValueError, r"x: expected rank 3 \[B, T, D\], got rank 2"),
    "x dtype": (put(0, lambda x: x.double()), TypeError, r"x: expected dtype .* got float64"),
    "weight shape": (put(1, lambda w: w[1:]), ValueError, r"weight: expected shape \(D=32, W=4\), got \(31, 4\)"),
    "width 1": (put(1, lambda w: w[:, :1]), ValueError, r"weight: expected a width of 2 to 6, got W=1"),
    "width 7": (put(1, lambda w: w[:, :1].expand(-1, 7)), ValueError, r"weight: expected a width of 2 to 6, got W=7"),
    "bias shape": (give(bias=lambda b: b[1:]), ValueError, r"bias: expected shape \(D=32,\), got \(31,\)"),
    "activation": (give(activation=lambda _: "relu"), ValueError, r"activation: expected None, 'silu' or 'swish', got 'relu'"),
    "batch and packed": (put(0, lambda x: x.expand(2, -1, -1)), ValueError, r"x: expected B=1 with cu_seqlens, got \(2,"),
    "pool dtype": (give(conv_state=lambda s: s.float()), TypeError, r"conv_state: expected the dtype of x, bfloat16"),
    "pool rows": (give(conv_state=lambda s: s[:, :2]), ValueError, r"conv_state: expected shape \(S, L, D=32\) with L >= 3"),
    "pool strides": (
        give(conv_state=lambda s: s.transpose(1, 2).contiguous().transpose(1, 2)),
        ValueError, r"conv_state: expected dense channels",
    ),
    "pool and state": (
        give(initial_state=lambda _: torch.zeros(2, 3, 32)), ValueError, r"initial_state: expected None with conv_state",
    ),
    "no slots": (give(state_indices=lambda _: None), ValueError, r"state_indices: expected shape \(N_seq=2,\) with conv_state"),
    "slot beyond the pool": (give(state_indices=lambda s: s + 5), ValueError, r"state_indices: expected slots < S=5, got"),
    "flags as integers": (give(has_initial_state=lambda h: h.int()), TypeError, r"has_initial_state: expected dtype bool"),
    "index device": (give(state_indices=lambda s: s.to("meta")), ValueError, r"state_indices: expected device cpu"),
    "bounds descend": (
        give(cu_seqlens=lambda c: torch.tensor([0, 9, 8], dtype=torch.int32)), ValueError, r"cu_seqlens: expected 0 <= …",
    ),
    "null slot type": (give(null_slot=lambda _: 1.0), TypeError, r"null_slot: expected an int or None, got float"),
    "null slot of many bits": (give(null_slot=lambda _: 2**31), ValueError, r"null_slot: expected a slot number of 32 bits"),
    "out shape": (give(out=lambda _: torch.zeros(1, 12, 32).bfloat16()), ValueError, r"out: expected shape \(1, 13, 32\)"),
    "out is x": (lambda a, k: k.update(out=a[0]), ValueError, r"out: expected memory of its own, got x's"),
    "not a tensor": (put(1, lambda w: w.tolist()), TypeError, r"weight: expected a torch.Tensor, got list"),
    "elsewhere": (put(0, lambda x: x.to_sparse()), TypeError, r"x: expected a strided torch.Tensor with memory of its own"),
    "activation list": (give(activation=lambda _: ["silu"]), ValueError, r"activation: expected None, 'silu' or"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPT_ERRORS)
def test_prompt_errors_name_the_argument_and_touch_nothing(name):
    spoil, kind, text = PROMPT_ERRORS[name]
    arguments, keywords = prompt()
    pool = keywords["conv_state"]
    before = pool.clone()
    spoil(arguments, keywords)
    with pytest.raises(kind, match=text):
        triton_ssm.causal_conv1d(*arguments, **keywords)
    assert torch.equal(pool, before)


@pytest.mark.parametrize(
    "sizes, chunk_size, kind, text",
    [
        (
            (16, 8),
            None,
            ValueError,
            r"sizes: expected 1 to 4 positive channel counts that add up to D=32, got \(16, 8\)",
        ),
        ((8, 8, 8, 4, 4), None, ValueError, r"sizes: expected 1 to 4"),
        ((32, 0), None, ValueError, r"sizes: expected 1 to 4 positive"),
        ((31, True), None, ValueError, r"sizes: expected 1 to 4 positive"),
        ((32,), 24, ValueError, r"chunk_size: expected a power of two from 16 to 2048, got 24"),
        ((32,), 16.0, TypeError, r"chunk_size: expected an int or None, got float"),
        ((32,), [16], TypeError, r"chunk_size: expected an int or None, got list"),
        (32, None, TypeError, r"sizes: expected a tuple of ints, got int"),
        ("32", None, TypeError, r"sizes: expected a tuple of ints, got str"),
        (None, None, TypeError, r"sizes: expected a tuple of ints, got NoneType"),
        ((16.0, 16), None, ValueError, r"sizes: expected 1 to 4 positive channel counts"),
    ],
)
def test_split_errors(sizes, chunk_size, kind, text):
    (x, weight), keywords = prompt()
    triton_ssm.causal_conv1d_split(x[:, :0], weight, (16, 16))  # what was legal once says nothing of its like
    with pytest.raises(kind, match=text):
        triton_ssm.causal_conv1d_split(x, weight, sizes, chunk_size=chunk_size, **keywords)


UPDATE_ERRORS = {
    "x rank": (put(0, lambda x: x[:, None]), ValueError, r"x: expected rank 2 \[T, D\], got rank 3"),
    "state dtype": (put(1, lambda s: s.half()), TypeError, r"conv_state: expected the dtype of x, bfloat16, got float16"),
    "slots": (give(conv_state_indices=lambda s: s[:2]), ValueError, r"conv_state_indices: expected shape \(N_seq=3,\), got"),
    "slot beyond the pool": (give(conv_state_indices=lambda s: s + 6), ValueError, r"conv_state_indices: expected slots < S=6"),
    "null slot alone": (
        lambda a, k: (k.pop("conv_state_indices"), k.update(null_slot=0)),
        ValueError, r"null_slot: expected None without conv_state_indices, got 0",
    ),
    "too few slots": (
        lambda a, k: (k.pop("conv_state_indices"), a.__setitem__(1, a[1][:2])),
        ValueError, r"conv_state: expected at least one slot for each of 3 sequences, got S=2",
    ),
    "slots in one place": (
        put(1, lambda s: s[:1].expand(6, -1, -1)), ValueError, r"conv_state: expected elements that do not overlap, got",
    ),
    "rows in one place": (
        give(out=lambda _: torch.zeros(1, 32).bfloat16().expand(3, 32)),
        ValueError, r"out: expected elements that do not overlap, got strides \(0, 1\)",
    ),
    "accepted shape": (
        give(num_accepted_tokens=lambda _: torch.ones(2, dtype=torch.int32)),
        ValueError, r"num_accepted_tokens: expected shape \(N_seq=3,\), got \(2,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UPDATE_ERRORS)
def test_update_errors_name_the_argument_and_touch_nothing(name):
    spoil, kind, text = UPDATE_ERRORS[name]
    arguments, keywords = step()
    state = arguments[1]
    before = state.clone()
    spoil(arguments, keywords)
    with pytest.raises(kind, match=text):
        triton_ssm.causal_conv1d_update(*arguments, **keywords)
    assert torch.equal(state, before)


def test_a_gradient_is_refused_and_not_dropped():
    (x, weight), keywords = prompt()
    with pytest.raises(RuntimeError, match="weight: causal_conv1d has no backward"):
        triton_ssm.causal_conv1d(x, weight.requires_grad_(), **keywords)


def test_without_a_sequence_only_rows_that_exist_are_written(monkeypatch: pytest.MonkeyPatch):
    from triton_ssm import _plans

    launched: list[tuple] = []
    launch = _plans.Launcher.__call__
    monkeypatch.setattr(_plans.Launcher, "__call__", lambda self, *given: launched.append(given))
    weight, nobody = torch.zeros(8, 4), torch.zeros(1, dtype=torch.int32)
    (y,), _ = triton_ssm.causal_conv1d_split(torch.ones(1, 5, 8), weight, (8,), chunk_size=16, cu_seqlens=nobody)
    assert y.shape == (1, 0, 8) and not launched
    monkeypatch.setattr(_plans.Launcher, "__call__", launch)
    (y,), _ = triton_ssm.causal_conv1d_split(torch.ones(1, 17, 8), weight, (8,), chunk_size=16, cu_seqlens=nobody)
    assert y.shape == (1, 16, 8) and not y.any()


def test_weights_may_begin_anywhere():
    """Taps are loaded as 64-bit words, which fault on a GPU where they do not begin at a multiple of 8 bytes."""
    (x, state, weight), keywords = step()
    odd = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(weight.shape)
    assert odd.data_ptr() % 8 and not _causal_conv1d_window.word_aligned(odd).data_ptr() % 8
    assert _causal_conv1d_window.word_aligned(weight) is weight
    expected = triton_ssm.causal_conv1d_update(x, state.clone(), weight, **keywords)
    assert torch.equal(triton_ssm.causal_conv1d_update(x, state.clone(), odd, **keywords), expected)


@pytest.mark.parametrize("module", [_causal_conv1d_kernel, _causal_conv1d_update_kernel, _causal_conv1d_window])
def test_every_argument_a_kernel_takes_is_read(module):
    for name, function in inspect.getmembers(module, lambda member: hasattr(member, "fn")):
        source = textwrap.dedent(inspect.getsource(function.fn))
        (definition,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
        read = {
            node.id for node in ast.walk(definition) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        unread = {argument.arg for argument in definition.args.args} - read
        assert not unread, f"{name} never reads {sorted(unread)}"


def test_state_layouts_stay_bits():
    (x, state, weight), keywords = step(spec=True, spare_rows=0)
    expected = from_torch(x).copy()
    triton_ssm.causal_conv1d_update(x, state, weight, **keywords)
    slots = keywords["conv_state_indices"].long()
    assert from_torch(state[slots, 2]).tobytes() == np.ascontiguousarray(expected).tobytes()


def test_a_remembered_launch_is_for_the_same_integers(monkeypatch: pytest.MonkeyPatch):
    """What Triton specialises on (an out's row stride among it) must be in the key under which a launch is remembered."""
    from triton_ssm import _plans

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: reused.append(arguments)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: Compiled()

    monkeypatch.setattr(_plans, "CompiledKernel", Compiled)
    reused: list[tuple] = []
    launch, tensor = _plans.Launcher(Kernel()), torch.zeros(4)
    for stride in (16, 17, 16):
        launch("key", (1, 1, 1), (tensor, stride, tensor), (), 4)
    assert [arguments[1] for arguments in reused] == [16]
