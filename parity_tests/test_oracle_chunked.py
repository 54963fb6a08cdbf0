"""The definitions of the chunked operators: the stages compose to the recurrence, and single tokens come out by hand."""

from typing import Any

import numpy as np
import pytest

from .oracle import gdn, ssd

PACKINGS = pytest.mark.parametrize(
    "B, T, cu_seqlens", [(2, 37, None), (1, 60, np.array([0, 17, 17, 19, 50])), (1, 16, np.array([0, 0]))]
)


def sequences(B, cu_seqlens):
    return B if cu_seqlens is None else len(cu_seqlens) - 1


def assert_equal(got, expected):
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def scan_arguments(B, T, n_seq, H=4, G=2, P=3, N=5):
    rng = np.random.default_rng(0)
    x, dt, B_, C = (rng.normal(size=shape) for shape in ((B, T, H, P), (B, T, H), (B, T, G, N), (B, T, G, N)))
    A = -rng.uniform(0.1, 4, H)
    named: dict[str, Any] = {"D": rng.normal(size=H), "z": rng.normal(size=x.shape), "dt_bias": rng.normal(size=H)}
    return (x, dt, A, B_, C), named | {"dt_softplus": True, "initial_states": rng.normal(size=(n_seq, H, P, N))}


@PACKINGS
def test_scan_stages_compose_to_the_recurrence(B, T, cu_seqlens):
    arguments, named = scan_arguments(B, T, sequences(B, cu_seqlens))
    named |= {"chunk_size": 16, "cu_seqlens": cu_seqlens, "return_intermediate_states": True}
    expected = ssd.mamba_chunk_scan_combined(*arguments, **named)
    assert_equal(ssd.mamba_chunk_scan_by_stages(*arguments, **named), expected)


def test_scan_of_two_tokens_by_hand():
    one = np.ones((1, 2, 1, 1))
    x, dt = one * np.array([2.0, 3.0]).reshape(1, 2, 1, 1), np.array([[[0.5], [0.25]]])
    y, final, *_ = ssd.mamba_chunk_scan_combined(
        x, dt, np.array([-2.0]), 5 * one, 7 * one, chunk_size=16, D=np.array([11.0]), dt_limit=(0.3, 1.0)
    )
    first = 0.5 * 2 * 5
    second = first * np.exp(-2 * 0.3) + 0.3 * 3 * 5  # the limit lifts 0.25
    np.testing.assert_allclose(y[0, :, 0, 0], [7 * first + 22, 7 * second + 33], rtol=1e-15)
    np.testing.assert_allclose(final[0, 0, 0, 0], second, rtol=1e-15)


def test_scan_goes_on_from_the_state_it_returned():
    (x, dt, A, B, C), named = scan_arguments(1, 50, 1)
    z, initial = named.pop("z"), named.pop("initial_states")
    whole = ssd.mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=16, z=z, initial_states=initial, **named)
    parts, state = [], initial
    for rows in (slice(0, 13), slice(13, 50)):
        tensors = (x[:, rows], dt[:, rows], A, B[:, rows], C[:, rows])
        y, state, *_ = ssd.mamba_chunk_scan_combined(
            *tensors, chunk_size=16, z=z[:, rows], initial_states=state, **named
        )
        parts.append(y)
    assert_equal((np.concatenate(parts, 1), state), whole)


def delta_arguments(B, T, n_seq, H_k=2, H_v=4, K=5, V=3):
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, B, T, H_k, K))
    v, g, beta = rng.normal(size=(B, T, H_v, V)), -rng.uniform(0, 0.3, (B, T, H_v)), rng.uniform(0, 1, (B, T, H_v))
    return (q, k, v, g, beta), {"use_qk_l2norm": True, "initial_state": rng.normal(size=(n_seq, H_v, K, V))}


@PACKINGS
@pytest.mark.parametrize("chunk_size", [16, 32])
def test_delta_rule_stages_compose_to_the_recurrence(B, T, cu_seqlens, chunk_size):
    arguments, named = delta_arguments(B, T, sequences(B, cu_seqlens))
    named |= {"chunk_size": chunk_size, "cu_seqlens": cu_seqlens}
    assert_equal(
        gdn.chunk_gated_delta_rule_by_stages(*arguments, **named), gdn.chunk_gated_delta_rule(*arguments, **named)
    )


def test_delta_rule_of_one_token_by_hand():
    one = np.ones((1, 1, 1, 1))
    initial = np.full((1, 1, 1, 1), 3.0)
    o, final = gdn.chunk_gated_delta_rule(
        2 * one, 5 * one, 7 * one, np.full((1, 1, 1), np.log(0.5)), np.full((1, 1, 1), 0.1), scale=10.0, initial_state=initial
    )  # fmt: skip
    state = 1.5 + 5 * 0.1 * (7 - 1.5 * 5)
    np.testing.assert_allclose((final.item(), o.item()), (state, 10 * state * 2), rtol=1e-15)


def test_gates_of_another_base_and_states_of_another_layout_say_the_same():
    (q, k, v, g, _), _ = delta_arguments(1, 40, 1)
    h = np.random.default_rng(2).normal(size=(1, 3, 4, 5, 3))
    gate = gdn.chunk_local_cumsum(g, chunk_size=16)
    o = gdn.chunk_o(q, k, v, h, g=gate, chunk_size=16)
    other = gdn.chunk_o(
        q, k, v, h.swapaxes(-1, -2), g=gate / np.log(2), gate_base="2", chunk_size=16, state_layout="VK"
    )
    np.testing.assert_allclose(o, other, rtol=1e-12)
