"""Both packages convert the same things by the same names, and what comes back is what went in."""

import inspect
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import pallas_ssm
import triton_ssm

NAMES = [name for name, _ in inspect.getmembers(triton_ssm.layouts, inspect.isfunction)]
BOTH = pytest.mark.parametrize(
    "layouts, array", [(triton_ssm.layouts, torch.tensor), (pallas_ssm.layouts, jnp.array)], ids=["triton", "pallas"]
)


def test_the_packages_have_the_same_converters():
    theirs = [name for name, _ in inspect.getmembers(pallas_ssm.layouts, inspect.isfunction) if name[0] != "_"]
    assert NAMES == theirs
    for name in NAMES:
        ours, other = (inspect.signature(getattr(package.layouts, name)) for package in (triton_ssm, pallas_ssm))
        assert list(ours.parameters) == list(other.parameters), name


@BOTH
def test_conv_states(layouts, array):
    state = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    vllm = layouts.conv_state_to_vllm(array(state))
    np.testing.assert_array_equal(np.asarray(vllm), state.transpose(0, 2, 1))
    np.testing.assert_array_equal(np.asarray(layouts.conv_state_from_vllm(vllm)), state)
    dao = layouts.conv_state_to_causal_conv1d(array(state), state_len=4)
    assert tuple(dao.shape) == (2, 5, 4) and not np.asarray(dao)[:, :, 0].any()
    np.testing.assert_array_equal(np.asarray(layouts.conv_state_from_causal_conv1d(dao, width=4)), state)
    with pytest.raises(ValueError, match="state_len: expected at least 3, got 2"):
        layouts.conv_state_to_causal_conv1d(array(state), state_len=2)
    with pytest.raises(ValueError, match="expected state_len >= 5 for width 6, got 4"):
        layouts.conv_state_from_causal_conv1d(dao, width=6)


@BOTH
def test_gated_delta_rule_states(layouts, array):
    state = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    for library, options in (("vllm", {}), ("flashinfer", {}), ("fla", {"state_v_first": True})):
        to, back = (getattr(layouts, f"gdn_state_{way}_{library}") for way in ("to", "from"))
        swapped = to(array(state), **options)
        np.testing.assert_array_equal(np.asarray(swapped), state.transpose(0, 1, 3, 2))
        np.testing.assert_array_equal(np.asarray(back(swapped, **options)), state)
    for same in (layouts.gdn_state_to_fla, layouts.gdn_state_from_fla):
        np.testing.assert_array_equal(np.asarray(same(array(state))), state)


def test_a_pool_of_vllms_is_updated_where_it_lies(interpret):
    if not interpret:
        pytest.skip("runs the interpreter")
    torch.manual_seed(0)
    pool = torch.randn(3, 2, 16, 8)  # [S,H_v,V,K]
    ours = pool.transpose(-1, -2).contiguous()
    projection = torch.randn(2, 2 * 8 + 2 * 16)
    q, k, v = triton_ssm.layouts.gdn_qkv_from_vllm(projection, key_heads=1, key_dim=8, value_dim=16)
    assert q.data_ptr() == projection.data_ptr() and v.stride() == (48, 16, 1)
    g, beta = -torch.rand(2, 2), torch.rand(2, 2)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    options: Any = {"state_indices": slots, "null_slot": 0}
    view = triton_ssm.layouts.gdn_state_from_vllm(pool)
    o = triton_ssm.fused_recurrent_gated_delta_rule(q, k, v, g, beta, view, **options)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    expected = triton_ssm.fused_recurrent_gated_delta_rule(q, k, v, g, beta, ours, **options)
    assert torch.equal(o, expected) and not o[1].any()
    torch.testing.assert_close(pool.transpose(-1, -2), ours, rtol=0, atol=0)


@BOTH
def test_queries_keys_and_values_of_one_projection(layouts, array):
    mixed = np.arange(2 * 38, dtype=np.float32).reshape(2, 38)  # two heads of 4, twice, and two of 11
    q, k, v = layouts.gdn_qkv_from_vllm(array(mixed), key_heads=2, key_dim=4, value_dim=11)
    assert [tuple(part.shape) for part in (q, k, v)] == [(2, 2, 4), (2, 2, 4), (2, 2, 11)]
    np.testing.assert_array_equal(np.asarray(k)[1].ravel(), mixed[1, 8:16])
    np.testing.assert_array_equal(np.asarray(layouts.gdn_qkv_to_vllm(q, k, v)), mixed)
    for value_dim in (12, 0):
        with pytest.raises(
            ValueError, match=r"mixed_qkv: expected 2·2·4 elements .* value_dim=\d+ more, got shape \(2, 38\)"
        ):
            layouts.gdn_qkv_from_vllm(array(mixed), key_heads=2, key_dim=4, value_dim=value_dim)


@BOTH
def test_conv_weights(layouts, array):
    weight = np.arange(12, dtype=np.float32).reshape(4, 1, 3)
    np.testing.assert_array_equal(np.asarray(layouts.conv_weight_from_conv1d(array(weight))), weight[:, 0])
    with pytest.raises(ValueError, match=r"weight: expected shape \(D, 1, W\), got \(4, 3\)"):
        layouts.conv_weight_from_conv1d(array(weight[:, 0]))


@BOTH
def test_per_head_numbers(layouts, array):
    dt, A, D = (np.arange(1, size + 1, dtype=np.float32) for size in (6, 2, 2))
    repeated = layouts.selective_state_update_to_mamba_ssm(
        array(dt.reshape(3, 2)), array(A), array(D), headdim=4, dstate=5
    )
    assert [tuple(part.shape) for part in repeated[:3]] == [(3, 2, 4), (2, 4, 5), (2, 4)] and repeated.dt_bias is None
    back = layouts.selective_state_update_from_vllm(*repeated, has_indices=True)
    assert back.null_slot == 0
    for got, expected in zip(back.per_head[:3], (dt.reshape(3, 2), A, D), strict=True):
        np.testing.assert_array_equal(np.asarray(got), expected)
