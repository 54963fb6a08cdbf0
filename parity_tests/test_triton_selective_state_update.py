"""`triton_ssm.selective_state_update` in the interpreter against the oracle: every option, drawn shapes, every error."""

import ast
import inspect
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import triton_ssm
from ssm_configs import override
from triton_ssm import _selective_state_update_kernel as kernel_module

from .cases import Case, select
from .compare import against_oracle
from .inputs import DTYPES, draw
from .operators import OPERATORS, oracle_results
from .oracle.philox import state_bits, stochastic_round
from .runners import from_torch, to_torch, torch_runner

OP = "selective_state_update"


def arguments_of(case: Case, seed: int = 0):
    """torch arguments on the CPU."""
    arguments, keywords = draw(case, seed)
    return [to_torch(a, "cpu") for a in arguments], {name: to_torch(value, "cpu") for name, value in keywords.items()}


def small(**options) -> Case:
    dims = {"S": 6, "B": 3, "H": 2, "G": 1, "P": 8, "N": 16}
    dtypes = {name: options.pop(name) for name in ("dtype", "state_dtype") if name in options}
    full = {"D": True, "dt_bias": True, "dt_softplus": True, "slots": True}
    return Case(OP, "small", dims, **dtypes, options=full | options)


def check(case: Case, seed: int = 0, few: bool = False) -> None:
    """`few`: so few elements that one unlucky rounding is the whole relative error, not an average over many."""
    arguments, keywords = draw(case, seed)

    def poisoned(state, x, *others, **named):
        out = torch.full_like(x, float("nan"))
        y = triton_ssm.selective_state_update(state, x, *others, **named, out=out)
        assert y is out
        return y

    result = torch_runner(OPERATORS[OP], poisoned, interpret=True)(arguments, keywords)
    expected = oracle_results(case, arguments, keywords)
    for comparison in against_oracle(case, arguments, keywords, result, expected):
        assert comparison.ok or (few and comparison.error.within(comparison.worst, comparison.worst)), (
            comparison,
            case,
        )


@pytest.mark.parametrize("case", select(op=OP, tags=("ci",)), ids=str)
def test_registry(case: Case):
    check(case)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_drawn_shapes_and_options(data):
    G = data.draw(st.integers(1, 3))
    options = data.draw(
        st.fixed_dictionaries(
            {name: st.booleans() for name in ("D", "z", "dt_bias", "dt_softplus", "untied", "slots", "dst", "padding")}
        )
    )
    options["D_per_headdim"] = options["untied"]
    if options["padding"] or options["dst"]:
        options["slots"] = True
    lengths = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=4))
    B = data.draw(st.integers(1, 4))
    if lengths is not None:
        options |= {"lengths": tuple(lengths), "tail": data.draw(st.integers(0, 2))}
        if data.draw(st.booleans()):
            options["spec"] = data.draw(st.integers(1, 4))
    case = Case(
        OP,
        "drawn",
        {
            "S": 20, "B": B, "H": G * data.draw(st.integers(1, 2)), "G": G,
            "P": data.draw(st.integers(1, 20)), "N": data.draw(st.integers(1, 40)),
        },
        data.draw(st.sampled_from(sorted(DTYPES))),
        data.draw(st.sampled_from(sorted(DTYPES))),
        {name: value for name, value in options.items() if value is not False},
    )  # fmt: skip
    with override(OP, BLOCK_SIZE_M=data.draw(st.sampled_from([1, 4, 16])), num_warps=1):
        check(case, seed=data.draw(st.integers(0, 100)), few=True)


def test_the_result_does_not_depend_on_the_launch():
    results = []
    for block in (1, 2, 8, 32):
        arguments, keywords = arguments_of(small(state_dtype="bfloat16", z=True))
        with override(OP, BLOCK_SIZE_M=block, num_warps=4):
            y = triton_ssm.selective_state_update(*arguments, **keywords)
        results.append((from_torch(y).tobytes(), from_torch(arguments[0]).tobytes()))
    assert len(set(results)) == 1


def test_expanded_views_are_taken_as_per_head_numbers():
    case = small()
    (state, x, dt, A, B, C), keywords = arguments_of(case)
    expected_state = state.clone()
    expected = triton_ssm.selective_state_update(expected_state, x, dt, A, B, C, **keywords)
    H, P, N = x.shape[1], x.shape[2], B.shape[2]
    keywords["D"] = keywords["D"][:, None].expand(H, P)
    keywords["dt_bias"] = keywords["dt_bias"][:, None].expand(H, P)
    y = triton_ssm.selective_state_update(
        state, x, dt[:, :, None].expand(-1, H, P), A[:, None, None].expand(H, P, N), B, C, **keywords
    )
    assert torch.equal(y, expected) and torch.equal(state, expected_state)


def test_views_into_larger_buffers():
    """x, B and C as slices of one projection, a pool whose slots lie apart, and a strided out."""
    case = small(z=True)
    (state, x, dt, A, B, C), keywords = arguments_of(case)
    expected_state = state.clone()
    expected = triton_ssm.selective_state_update(expected_state, x, dt, A, B, C, **keywords)
    T, H, P = x.shape
    N = B.shape[2]
    projection = torch.full((T, H * P + 2 * N + 5), float("nan"), dtype=x.dtype)
    parts = projection.split([H * P, N, N, 5], dim=1)
    views = [part.unflatten(1, shape) for part, shape in zip(parts, ((H, P), (1, N), (1, N)), strict=False)]
    for view, tensor in zip(views, (x, B, C), strict=True):
        view.copy_(tensor)
    pool = torch.full((state.shape[0], 2, H, P, N), 7.0)
    pool[:, 0] = state
    out = torch.empty(T, 3, H, P, dtype=x.dtype)
    y = triton_ssm.selective_state_update(
        pool[:, 0], views[0], dt.T.contiguous().T, A, views[1], views[2], **keywords, out=out[:, 1]
    )
    assert torch.equal(y, expected) and torch.equal(pool[:, 0], expected_state)
    assert (pool[:, 1] == 7).all()


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("seed", [0, 12345, 2**64 - 1, "tensor"])
@pytest.mark.parametrize("N", [16, 24, 4])
def test_stochastic_rounding_gives_the_defined_bits(state_dtype, seed, N):
    # Few significant bits in x and B make dt·x·B exact in fp32, so that nothing but the rounding is left to differ.
    rng = np.random.default_rng(3)
    S, B, H, P = 5, 3, 2, 8
    x = torch.from_numpy(rng.integers(-127, 128, (B, H, P)).astype(np.float32) / 64)
    Bm = torch.from_numpy(rng.integers(-2047, 2048, (B, 1, N)).astype(np.float32) / 2 ** rng.integers(5, 30, (B, 1, N)))
    Bm = Bm.to(torch.float32)
    state = torch.zeros(S, H, P, N, dtype=getattr(torch, state_dtype))
    slots = torch.tensor([4, -1, 2], dtype=torch.int32)
    rounding_seed = torch.tensor([99], dtype=torch.int64) if seed == "tensor" else seed
    triton_ssm.selective_state_update(
        state, x, torch.ones(B, H), -torch.ones(H), Bm, torch.ones(B, 1, N), state_batch_indices=slots,
        rounding_seed=rounding_seed,
    )  # fmt: skip
    exact = x.numpy()[:, :, :, None] * Bm.numpy()[:, :, None, :]
    number = 99 if seed == "tensor" else seed
    for n, slot in ((0, 4), (2, 2)):
        expected = stochastic_round(exact[n], state_bits(number, slot, H, P, N), state_dtype)
        assert from_torch(state[slot]).tobytes() == expected.tobytes()
    assert not state[[0, 1, 3]].any()


def test_a_gradient_is_refused_and_not_dropped():
    arguments, keywords = arguments_of(small())
    arguments[1].requires_grad_()
    with pytest.raises(RuntimeError, match="x: selective_state_update has no backward"):
        triton_ssm.selective_state_update(*arguments, **keywords)
    with torch.no_grad():
        triton_ssm.selective_state_update(*arguments, **keywords)
    arguments[1].requires_grad_(False)
    with pytest.raises(RuntimeError, match="out: what is written has no backward"):
        triton_ssm.selective_state_update(*arguments, **keywords, out=torch.zeros_like(arguments[1]).requires_grad_())


def test_a_tangent_is_refused_and_not_dropped():
    """Also where a call like it, without one, was taken before."""
    arguments, keywords = arguments_of(small())
    triton_ssm.selective_state_update(*arguments, **keywords)
    with forward_ad.dual_level():
        triton_ssm.selective_state_update(*arguments, **keywords)
        arguments[1] = forward_ad.make_dual(arguments[1], torch.ones_like(arguments[1]))
        with pytest.raises(RuntimeError, match="x: selective_state_update has no backward"):
            triton_ssm.selective_state_update(*arguments, **keywords)


def test_no_tokens_is_no_work():
    (state, x, dt, A, B, C), _ = arguments_of(small(slots=False))
    before = state.clone()
    y = triton_ssm.selective_state_update(state, x[:0], dt[:0], A, B[:0], C[:0])
    assert y.shape == (0, 2, 8) and torch.equal(state, before)


def test_padding_rows_beyond_no_sequence_are_zero():
    (state, x, dt, A, B, C), _ = arguments_of(small(slots=False))
    before, out = state.clone(), torch.full_like(x, float("nan"))
    triton_ssm.selective_state_update(state, x, dt, A, B, C, cu_seqlens=torch.zeros(1, dtype=torch.int32), out=out)
    assert not out.any() and torch.equal(state, before)


ERRORS = {
    "state rank": (lambda a, k: a.__setitem__(0, a[0][0, 0]), ValueError, r"state: expected rank 4 .* got rank 2"),
    "no slot": (lambda a, k: a.__setitem__(0, a[0][:0]), ValueError, r"state: expected at least one slot, got S=0"),
    "state rank beside a scalar": (
        lambda a, k: (a.__setitem__(0, a[0][0, 0]), k.update(D=torch.tensor(1.0))), ValueError, r"state: expected rank 4",
    ),
    "x rank": (lambda a, k: a.__setitem__(1, a[1][0]), ValueError, r"x: expected rank 3 \[T, H, P\], got rank 2"),
    "x shape": (lambda a, k: a.__setitem__(1, a[1][:, :, 1:]), ValueError, r"x: expected shape \(T=3, H=2, P=8\), got"),
    "dt shape": (lambda a, k: a.__setitem__(2, a[2][:2]), ValueError, r"dt: expected shape \(T=3, H=2\) or"),
    "A shape": (lambda a, k: a.__setitem__(3, a[3][:1]), ValueError, r"A: expected shape \(H=2,\) or .* got \(1,\)"),
    "H not divisible by G": (
        lambda a, k: (a.__setitem__(4, a[4].expand(3, 3, 16)), a.__setitem__(5, a[5].expand(3, 3, 16))),
        ValueError, r"B: expected shape \(T=3, G, N=16\) with H=2 divisible by G, got \(3, 3, 16\)",
    ),
    "C shape": (lambda a, k: a.__setitem__(5, a[5][:, :, 1:]), ValueError, r"C: expected shape \(T=3, G=1, N=16\), got"),
    "state dtype": (lambda a, k: a.__setitem__(0, a[0].double()), TypeError, r"state: expected dtype .* got float64"),
    "x dtype": (lambda a, k: a.__setitem__(1, a[1].int()), TypeError, r"x: expected dtype float32 or .* got int32"),
    "index dtype": (
        lambda a, k: k.update(state_batch_indices=k["state_batch_indices"].float()),
        TypeError, r"state_batch_indices: expected dtype int32 or int64, got float32",
    ),
    "index device": (
        lambda a, k: k.update(state_batch_indices=k["state_batch_indices"].to("meta")),
        ValueError, r"state_batch_indices: expected device cpu, .* got meta",
    ),
    "not a tensor": (lambda a, k: a.__setitem__(3, -1.0), TypeError, r"A: expected a torch.Tensor, got float"),
    "1-D slots in speculative decode": (
        lambda a, k: k.update(num_accepted_tokens=torch.ones(3, dtype=torch.int32)),
        ValueError, r"state_batch_indices: expected shape \(N_seq=3, T_max\) with num_accepted_tokens",
    ),
    "no slots in speculative decode": (
        lambda a, k: (k.pop("state_batch_indices"), k.update(num_accepted_tokens=torch.ones(3, dtype=torch.int32))),
        ValueError, r"state_batch_indices: expected shape \(N_seq, T_max\) .* got None",
    ),
    "2-D slots": (
        lambda a, k: k.update(state_batch_indices=k["state_batch_indices"][:, None]),
        ValueError, r"state_batch_indices: expected shape \(N_seq=3,\), got \(3, 1\)",
    ),
    "slot beyond the pool": (
        lambda a, k: k["state_batch_indices"].__setitem__(1, 6),
        ValueError, r"state_batch_indices: expected slots < S=6, got 6",
    ),
    "destination beyond the pool": (
        lambda a, k: k.update(dst_state_batch_indices=k["state_batch_indices"] + 6),
        ValueError, r"dst_state_batch_indices: expected slots < S=6",
    ),
    "too few slots": (
        lambda a, k: (k.pop("state_batch_indices"), a.__setitem__(0, a[0][:2])),
        ValueError, r"state: expected at least one slot for each of 3 sequences, got S=2",
    ),
    "destination without source": (
        lambda a, k: k.update(dst_state_batch_indices=k.pop("state_batch_indices")),
        ValueError, r"dst_state_batch_indices: expected None without state_batch_indices",
    ),
    "null slot without slots": (
        lambda a, k: (k.pop("state_batch_indices"), k.update(null_slot=0)),
        ValueError, r"null_slot: expected None without state_batch_indices, got 0",
    ),
    "seed with fp32": (lambda a, k: k.update(rounding_seed=1), ValueError, r"rounding_seed: expected None with a float32"),
    "seed type": (
        lambda a, k: (a.__setitem__(0, a[0].half()), k.update(rounding_seed=1.5)),
        TypeError, r"rounding_seed: expected an int.* got float",
    ),
    "softplus list": (lambda a, k: k.update(dt_softplus=[True]), TypeError, r"dt_softplus: expected a bool, got list"),
    "softplus type": (lambda a, k: k.update(dt_softplus=1), TypeError, r"dt_softplus: expected a bool, got int"),
    "D shape": (lambda a, k: k.update(D=k["D"][:1]), ValueError, r"D: expected shape \(H=2,\) or \(H=2, P=8\), got \(1,\)"),
    "z shape": (lambda a, k: k.update(z=a[1][:, :1]), ValueError, r"z: expected shape \(T=3, H=2, P=8\), got"),
    "cu_seqlens descend": (
        lambda a, k: k.update(cu_seqlens=torch.tensor([0, 2, 1, 3], dtype=torch.int32)),
        ValueError, r"cu_seqlens: expected 0 <= … <= T=3 without a descent, got \[0, 2, 1, 3\]",
    ),
    "cu_seqlens rank": (
        lambda a, k: k.update(cu_seqlens=torch.zeros(1, 4, dtype=torch.int32)),
        ValueError, r"cu_seqlens: expected rank 1",
    ),
    "out dtype": (lambda a, k: k.update(out=a[1].half()), TypeError, r"out: expected the dtype of x, bfloat16, got float16"),
    "out shape": (lambda a, k: k.update(out=a[1][:2]), ValueError, r"out: expected shape \(3, 2, 8\), got \(2, 2, 8\)"),
    "out rows in one place": (
        lambda a, k: k.update(out=torch.zeros(1, 2, 8).to(a[1]).expand(3, 2, 8)),
        ValueError, r"out: expected elements that do not overlap, got strides \(0, 8, 1\)",
    ),
    "state strides": (
        lambda a, k: a.__setitem__(0, a[0].transpose(2, 3).contiguous().transpose(2, 3)),
        ValueError, r"state: expected strides \(any, 128, 16, 1\), got",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_and_touch_nothing(name):
    spoil, kind, text = ERRORS[name]
    arguments, keywords = arguments_of(small())
    spoil(arguments, keywords)
    before = arguments[0].clone()
    with pytest.raises(kind, match=text):
        triton_ssm.selective_state_update(*arguments, **keywords)
    assert torch.equal(arguments[0], before)


def test_every_integer_a_kernel_takes_is_read():
    """An integer that nobody reads still keys a compile for every new class of its values."""
    for name, function in inspect.getmembers(kernel_module, lambda member: hasattr(member, "fn")):
        source = textwrap.dedent(inspect.getsource(function.fn))
        (definition,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
        read = {
            node.id for node in ast.walk(definition) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        unread = {argument.arg for argument in definition.args.args} - read
        assert not unread, f"{name} never reads {sorted(unread)}"


def test_sizes_that_change_from_call_to_call_are_not_specialised():
    kernel = inspect.getsource(kernel_module)
    assert 'do_not_specialize=["n_tokens", "n_sequences", "n_slots", "null_slot"]' in kernel


def test_explain_takes_the_call_and_says_what_it_would_launch():
    arguments, keywords = arguments_of(small())
    explained = triton_ssm.explain(OP, *arguments, **keywords)
    assert "on NVIDIA H200: headdim=8, dstate=16, float32, size 6" in str(explained)
    with override(OP, BLOCK_SIZE_M=2, num_warps=1):
        assert triton_ssm.explain(OP, *arguments, **keywords).config["BLOCK_SIZE_M"] == 2
    with pytest.raises(TypeError, match="explain: selective_state_update has no argument 'zz'"):
        triton_ssm.explain(OP, *arguments, **keywords, zz=1)
    with pytest.raises(ValueError, match="op: expected one of"):
        triton_ssm.explain("nonsense")
