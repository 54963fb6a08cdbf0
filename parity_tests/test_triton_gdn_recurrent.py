"""`triton_ssm.fused_recurrent_gated_delta_rule` in the interpreter against the oracle: slots, packing, speculation, gates."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_ssm
from ssm_configs import override

from .compare import error
from .inputs import DTYPES
from .oracle import gdn as oracle
from .runners import from_torch, to_torch
from .test_triton_gdn import give, poisoned, put  # noqa: F401

OP = "fused_recurrent_gated_delta_rule"
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")
# By what an element was rounded to where it is stored: everything else is fp32.
LIMITS = {"float32": (1e-6, 4e-6), "bfloat16": (3e-3, 6e-3), "float16": (4e-4, 8e-4)}
TENSORS = ("q", "k", "v", "g", "beta", "state")


def draw(
    T: int = 4, *, S: int = 9, H_k: int = 1, H_v: int = 2, K: int = 16, V: int = 8, dtype: str = "bfloat16",
    state_dtype: str = "float32", lengths: tuple[int, ...] | None = None, tail: int = 0, spec: int = 0, dst: bool = False,
    padding: bool = False, slots: bool = True, gates: bool = False, l2norm: bool = False, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """All keyword arguments of a call, in NumPy."""
    rng = np.random.default_rng(seed)
    if lengths is not None:
        T = sum(lengths) + tail
    n_seq = T if lengths is None else len(lengths)
    kind = DTYPES[dtype]
    k = rng.standard_normal((T, H_k, K))
    found: dict[str, Any] = {
        "q": rng.standard_normal((T, H_k, K)).astype(kind),
        "k": (k if l2norm else k / np.linalg.norm(k, axis=-1, keepdims=True)).astype(kind),
        "v": rng.standard_normal((T, H_v, V)).astype(kind),
        "g": rng.uniform(-0.5, 0.1, (T, H_v)).astype(kind if gates else np.float32),
        "beta": rng.uniform(0, 1, (T, H_v)).astype(kind if gates else np.float32),
        "state": rng.standard_normal((S, H_v, K, V)).astype(DTYPES[state_dtype]),
    }
    if gates:
        found |= {
            "A_log": rng.uniform(-2, 2, H_v).astype(np.float32), "sigmoid_beta": True,
            "dt_bias": rng.standard_normal(H_v).astype(np.float32),
        }  # fmt: skip
    if l2norm:
        found["use_qk_l2norm"] = True
    if lengths is not None:
        found["cu_seqlens"] = np.cumsum([0, *lengths]).astype(np.int32)
    if slots or spec:
        free = rng.permutation([s for s in range(S) if s != 1 or not padding])
        shape, count = ((n_seq, spec), n_seq * spec) if spec else ((n_seq,), n_seq)
        source = free[:count].reshape(shape).astype(np.int32)
        if dst:
            target = source[:, ::-1] if spec else free[count : 2 * count]
            found["dst_state_indices"] = np.array(target.reshape(shape), np.int32)
        if padding:
            source[0], source[-1], found["null_slot"] = -1, 1, 1
        found["state_indices"] = source
        if spec:
            found["num_accepted_tokens"] = np.resize([0, spec + 2, 1, 2], n_seq).astype(np.int32)
    return found


def tensors(found: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    converted = {name: to_torch(value, "cpu") for name, value in found.items()}
    return [converted.pop(name) for name in TENSORS], converted


def check(found: dict[str, Any], few: float = 1.0) -> None:
    """`few`: so few elements that one unlucky rounding is the whole relative error."""
    arguments, keywords = tensors(found)
    out = torch.full_like(arguments[2], float("nan"))
    assert triton_ssm.fused_recurrent_gated_delta_rule(*arguments, **keywords, out=out) is out
    keywords = {name: value for name, value in found.items() if name not in TENSORS}
    o, state = oracle.fused_recurrent_gated_delta_rule(*(found[name] for name in TENSORS), **keywords)
    measured = error(from_torch(out), o)
    limits = LIMITS[found["v"].dtype.name]
    if found.get("use_qk_l2norm"):  # normalised queries and keys are rounded, too
        limits = tuple(max(2 * limit, limit) for limit in limits)
    assert measured.within(few * limits[0], few * limits[1]), measured
    empty = ~o.any(-1)
    assert not from_torch(out)[empty].astype(np.float32).any()
    limits = (
        max(limits, LIMITS[found["state"].dtype.name])
        if found.get("use_qk_l2norm")
        else LIMITS[found["state"].dtype.name]
    )
    measured = error(from_torch(arguments[5]), state)
    assert measured.within(few * limits[0], few * limits[1]), measured
    before = found["state"]
    untouched = np.array([np.array_equal(state[s], before[s].astype(np.float64)) for s in range(len(before))])
    assert from_torch(arguments[5])[untouched].tobytes() == before[untouched].tobytes()


CASES = {
    "nothing optional": {"slots": False, "dtype": "float32"},
    "slots": {},
    "fp16, padding and null slot": {"dtype": "float16", "state_dtype": "float16", "padding": True},
    "destination slots": {"dst": True, "padding": True, "T": 3},
    "groups, odd sizes": {"H_k": 2, "H_v": 6, "K": 20, "V": 17, "dtype": "float32"},
    "gates in the kernel": {"gates": True, "state_dtype": "bfloat16"},
    "gates, normalised": {"gates": True, "l2norm": True, "K": 24},
    "normalised, fp32": {"l2norm": True, "dtype": "float32", "H_k": 2, "H_v": 4},
    "packed, zero lengths, tail": {"lengths": (3, 0, 1, 2), "tail": 3},
    "packed, padding and destination slots": {"lengths": (2, 3, 1), "padding": True, "dst": True, "dtype": "float32"},
    "speculative": {"lengths": (3, 1, 0, 2), "spec": 4, "S": 20, "gates": True, "l2norm": True},
    "speculative, padding, destinations, 16 bits": {
        "lengths": (4, 2, 1), "spec": 3, "S": 20, "padding": True, "dst": True, "state_dtype": "float16",
    },
    "speculative, one token each": {"spec": 3, "S": 16},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name):
    check(draw(**CASES[name]))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_drawn(data):
    options = data.draw(
        st.fixed_dictionaries({name: st.booleans() for name in ("gates", "l2norm", "slots", "dst", "padding")})
    )
    options["slots"] |= options["dst"] or options["padding"]
    T, H_k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
    if data.draw(st.booleans()):
        options |= {"lengths": tuple(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)))}
        options["tail"] = data.draw(st.integers(0, 2))
        if data.draw(st.booleans()):
            options["spec"] = data.draw(st.integers(1, 4))
    found = draw(
        T, S=20, H_k=H_k, H_v=H_k * data.draw(st.integers(1, 2)), K=data.draw(st.integers(1, 40)),
        V=data.draw(st.integers(1, 20)), dtype=data.draw(st.sampled_from(sorted(DTYPES))),
        state_dtype=data.draw(st.sampled_from(sorted(DTYPES))), seed=data.draw(st.integers(0, 99)), **options,
    )  # fmt: skip
    with override(OP, BLOCK_SIZE_V=data.draw(st.sampled_from([1, 4, 16])), num_warps=1):
        check(found, few=4.0)


def test_the_result_does_not_depend_on_the_launch():
    results = []
    for block in (1, 4, 16, 256):
        arguments, keywords = tensors(draw(V=24, state_dtype="bfloat16", gates=True))
        with override(OP, BLOCK_SIZE_V=block, num_warps=4):
            o = triton_ssm.fused_recurrent_gated_delta_rule(*arguments, **keywords)
        results.append((from_torch(o).tobytes(), from_torch(arguments[5]).tobytes()))
    assert len(set(results)) == 1


def test_steps_continue_a_prompt():
    rng = np.random.default_rng(0)
    T, K, V = 20, 16, 8
    q, k = (rng.standard_normal((1, T, 1, K)).astype(np.float32) for _ in range(2))
    v = rng.standard_normal((1, T, 2, V)).astype(np.float32)
    g, beta = -rng.uniform(0, 0.2, (1, T, 2)).astype(np.float32), rng.uniform(0, 1, (1, T, 2)).astype(np.float32)
    whole = [to_torch(t, "cpu") for t in (q, k, v, g, beta)]
    o, final = triton_ssm.chunk_gated_delta_rule(*whole, chunk_size=16, use_qk_l2norm=True, return_final_state=True)
    _, state = triton_ssm.chunk_gated_delta_rule(
        *(t[:, :13] for t in whole), chunk_size=16, use_qk_l2norm=True, return_final_state=True
    )
    assert state is not None and final is not None
    for t in range(13, T):
        now: list[Any] = [*(x[:, t] for x in whole), state]
        step = triton_ssm.fused_recurrent_gated_delta_rule(*now, use_qk_l2norm=True)
        assert error(from_torch(step[0]), from_torch(o[0, t])).within(1e-5, 1e-5)
    assert error(from_torch(state), from_torch(final)).within(1e-5, 1e-5)


def test_a_pool_that_lies_the_other_way_and_views_of_one_projection():
    found = draw(H_k=2, H_v=2, K=16, V=16, state_dtype="bfloat16")
    arguments, keywords = tensors(found)
    expected = triton_ssm.fused_recurrent_gated_delta_rule(*arguments, **keywords)
    (q, k, v, g, beta, state), keywords = tensors(found)
    wide = torch.full((4, 101), float("nan"), dtype=torch.bfloat16)
    views = [wide[:, first : first + 32].unflatten(1, (2, 16)) for first in (0, 32, 64)]
    for view, tensor in zip(views, (q, k, v), strict=True):
        view.copy_(tensor)
    pool = torch.full((9, 3, 2, 16, 16), 7.0, dtype=torch.bfloat16)  # as [S,H_v,V,K], slots apart
    pool[:, 1] = state.mT
    out = torch.empty(4, 3, 2, 16, dtype=torch.bfloat16)
    given: list[Any] = [*views, g.T.contiguous().T, beta, pool[:, 1].mT]
    o = triton_ssm.fused_recurrent_gated_delta_rule(*given, **keywords, out=out[:, 1])
    # Sums of fp32 in the same order, though their operands lie elsewhere.
    assert torch.equal(o, expected) and torch.equal(pool[:, 1].mT, arguments[5])
    assert (pool[:, 0] == 7).all() and (pool[:, 2] == 7).all()


def test_no_token_and_padding_without_a_sequence():
    (q, k, v, g, beta, state), _ = tensors(draw(slots=False))
    before = state.clone()
    o = triton_ssm.fused_recurrent_gated_delta_rule(q[:0], k[:0], v[:0], g[:0], beta[:0], state)
    assert o.shape == (0, 2, 8)
    o = triton_ssm.fused_recurrent_gated_delta_rule(
        q, k, v, g, beta, state, cu_seqlens=torch.zeros(1, dtype=torch.int32)
    )
    assert not o.any() and torch.equal(state, before)


def test_neighbours_and_padding_reach_nobody():
    options = {"lengths": (2, 1, 2), "tail": 2, "padding": True}
    clean, spoilt = draw(**options), draw(**options)
    for name in ("q", "k", "v", "g", "beta"):
        spoilt[name] = spoilt[name].copy()
        spoilt[name][[0, 1, 3, 4, 5, 6]] = np.nan  # all but the middle sequence's: padding, null slot, tail
    spoilt["state"] = spoilt["state"].copy()
    others = [s for s in range(9) if s != clean["state_indices"][1]]
    spoilt["state"][others] = np.nan
    results = []
    for found in (clean, spoilt):
        arguments, keywords = tensors(found)
        results.append((triton_ssm.fused_recurrent_gated_delta_rule(*arguments, **keywords), arguments[5]))
    assert torch.equal(results[0][0], results[1][0]) and not results[1][0][[0, 1, 3, 4, 5, 6]].any()
    slot = int(clean["state_indices"][1])
    assert torch.equal(results[0][1][slot], results[1][1][slot])
    assert from_torch(results[1][1])[others].tobytes() == spoilt["state"][others].tobytes()


ERRORS = {
    "q rank": (put(0, lambda q: q[0]), ValueError, r"q: expected rank 3 \[T, H_k, K\], got rank 2"),
    "K": (put(0, lambda q: torch.zeros(4, 1, 300)), ValueError, r"q: expected K <= 256, got"),
    "k shape": (put(1, lambda k: k[:, :, 1:]), ValueError, r"k: expected shape \(T=4, H_k=1, K=16\), got \(4, 1, 15\)"),
    "k dtype": (put(1, lambda k: k.half()), TypeError, r"k: expected the dtype of q, bfloat16, got float16"),
    "v tokens": (put(2, lambda v: v[:2]), ValueError, r"v: expected shape \(T=4, H_v=2, V=8\), got \(2, 2, 8\)"),
    "v heads": (
        lambda a, k: [put(i, lambda x: x.expand(4, 3, 16))(a, k) for i in (0, 1)],
        ValueError, r"v: expected H_v to be a multiple of H_k=3",
    ),
    "g": (put(3, lambda g: g[:, :1]), ValueError, r"g: expected shape \(T=4, H_v=2\), got \(4, 1\)"),
    "beta dtype": (put(4, lambda b: b.double()), TypeError, r"beta: expected dtype .* got float64"),
    "state shape": (put(5, lambda s: s[..., 1:]), ValueError, r"state: expected shape \(S=9, H_v=2, K=16, V=8\), got"),
    "state strides": (
        put(5, lambda s: s.transpose(1, 3).contiguous().transpose(1, 3)),
        ValueError, r"state: expected strides \(any, 128, 8, 1\) or \(any, 128, 1, 16\), got",
    ),
    "overlapping slots": (
        put(5, lambda s: torch.zeros(300).as_strided((4, 2, 16, 8), (10, 128, 8, 1))), ValueError, r"state: expected slots",
    ),
    "no slot": (put(5, lambda s: s[:0]), ValueError, r"state: expected at least one slot, got S=0"),
    "too few slots": (
        lambda a, k: (k.pop("state_indices"), a.__setitem__(5, a[5][:2])),
        ValueError, r"state: expected at least one slot for each of 4 sequences, got S=2",
    ),
    "slot beyond the pool": (give(state_indices=lambda s: s + 9), ValueError, r"state_indices: expected slots < S=9, got"),
    "slots": (give(state_indices=lambda s: s[1:]), ValueError, r"state_indices: expected shape \(N_seq=4,\), got \(3,\)"),
    "slots dtype": (give(state_indices=lambda s: s.float()), TypeError, r"state_indices: expected dtype int32 or int64"),
    "accepted without slots for tokens": (
        give(num_accepted_tokens=lambda _: torch.ones(4, dtype=torch.int32)),
        ValueError, r"state_indices: expected shape \(N_seq=4, T_max\) with num_accepted_tokens",
    ),
    "null slot alone": (
        lambda a, k: (k.pop("state_indices"), k.update(null_slot=0)), ValueError, r"null_slot: expected None without",
    ),
    "null slot type": (give(null_slot=lambda _: True), TypeError, r"null_slot: expected an int or None, got bool"),
    "null slot of many bits": (give(null_slot=lambda _: 2**70), ValueError, r"null_slot: expected a slot number of 32 bits"),
    "dt_bias alone": (give(dt_bias=lambda _: torch.zeros(2)), ValueError, r"dt_bias: expected None without A_log"),
    "A_log": (give(A_log=lambda _: torch.zeros(3)), ValueError, r"A_log: expected shape \(H_v=2,\), got \(3,\)"),
    "sigmoid_beta": (give(sigmoid_beta=lambda _: 1), TypeError, r"sigmoid_beta: expected a bool, got int"),
    "scale": (give(scale=lambda _: math.inf), ValueError, r"scale: expected a finite number, got inf"),
    "out": (give(out=lambda _: torch.zeros(4, 2, 8)), TypeError, r"out: expected the dtype of v, bfloat16, got float32"),
    "out rows in one place": (
        give(out=lambda _: torch.zeros(1, 2, 8).bfloat16().expand(4, 2, 8)),
        ValueError, r"out: expected elements that do not overlap",
    ),
    "bounds": (give(cu_seqlens=lambda _: torch.tensor([0, 9])), ValueError, r"cu_seqlens: expected 0 <=|state_indices"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_and_touch_nothing(name):
    spoil, kind, text = ERRORS[name]
    arguments, keywords = tensors(draw())
    spoil(arguments, keywords)
    before = arguments[5].clone()
    with pytest.raises(kind, match=text):
        triton_ssm.fused_recurrent_gated_delta_rule(*arguments, **keywords)
    assert torch.equal(arguments[5], before)


def test_a_gradient_is_refused_and_not_dropped():
    arguments, keywords = tensors(draw())
    arguments[5].requires_grad_()
    with pytest.raises(RuntimeError, match="state: fused_recurrent_gated_delta_rule has no backward in triton_ssm"):
        triton_ssm.fused_recurrent_gated_delta_rule(*arguments, **keywords)


def test_explain_takes_the_call_and_says_what_it_would_launch():
    arguments, keywords = tensors(draw(gates=True))
    said = str(triton_ssm.explain(OP, *arguments, **keywords))
    assert "K=16, V=8, float32, size 8 = sequences x value heads" in said
    with pytest.raises(TypeError, match="explain: fused_recurrent_gated_delta_rule has no argument 'zz'"):
        triton_ssm.explain(OP, *arguments, **keywords, zz=1)
