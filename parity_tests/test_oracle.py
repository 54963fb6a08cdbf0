"""The definitions themselves: against closed forms and published vectors, not against the kernels."""

import ml_dtypes
import numpy as np
import pytest

from .oracle import selective_state_update
from .oracle.philox import philox_4x32, state_bits, stochastic_round


def test_one_number_by_hand():
    state = np.full((1, 1, 1, 1), 3.0)
    one = np.ones((1, 1, 1))
    y, new = selective_state_update(
        state, 2 * one, np.full((1, 1), -1.0), np.array([-0.5]), 5 * one, 7 * one, D=np.array([11.0]),
        z=np.full((1, 1, 1), 0.25), dt_bias=np.array([0.5]), dt_softplus=True,
    )  # fmt: skip
    dt = np.log1p(np.exp(-0.5))
    h = 3 * np.exp(-0.5 * dt) + dt * 2 * 5
    assert np.isclose(new[0, 0, 0, 0], h, rtol=1e-15)
    assert np.isclose(y[0, 0, 0], (7 * h + 11 * 2) * 0.25 / (1 + np.exp(-0.25)), rtol=1e-15)


def test_packed_tokens_are_single_steps_in_a_row():
    rng = np.random.default_rng(0)
    H, P, N, T = 4, 3, 5, 6
    x, dt, B, C = (rng.normal(size=shape) for shape in ((T, H, P), (T, H), (T, 2, N), (T, 2, N)))
    A = -np.arange(1.0, H + 1)
    state = rng.normal(size=(2, H, P, N))
    y, new = selective_state_update(state, x, dt, A, B, C, cu_seqlens=np.array([0, 2, 6]))
    for n, tokens in enumerate((range(0, 2), range(2, 6))):
        one = state[n : n + 1]
        for t in tokens:
            expected, one = selective_state_update(one, x[t : t + 1], dt[t : t + 1], A, B[t : t + 1], C[t : t + 1])
            np.testing.assert_allclose(y[t], expected[0], rtol=1e-13)
        np.testing.assert_allclose(new[n], one[0], rtol=1e-13)


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    assert tuple(int(word) for word in philox_4x32(counter, key)) == words


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stochastic_rounding_picks_a_neighbour_and_is_unbiased(dtype):
    target = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}[dtype]
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(size=200), rng.normal(size=200) * 2.0**-16, [0.0, -0.0, 1.0, 65000.0]])
    values = values.astype(np.float32)
    bits = np.arange(2**16, dtype=np.uint32)[:, None]
    rounded = stochastic_round(np.broadcast_to(values, (2**16, values.size)), bits, dtype).astype(np.float64)
    low, high = rounded.min(axis=0), rounded.max(axis=0)
    assert (low <= values).all() and (values <= high).all()
    # Two neighbours at most, and over all 2^16 bit patterns the mean is the value, to the resolution of the bits.
    assert all(len(np.unique(column)) <= 2 for column in rounded.T)
    step = np.where(high > low, high - low, np.spacing(np.abs(values).astype(target)).astype(np.float64))
    assert (np.abs(rounded.mean(axis=0) - values) <= step * 2.0**-12).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stochastic_rounding_leaves_what_is_not_finite_alone(dtype):
    values = np.array([np.inf, -np.inf, np.nan, 3.4e38], np.float32)
    rounded = stochastic_round(values, np.full(4, 0xFFFF), dtype).astype(np.float64)
    np.testing.assert_array_equal(rounded[:3], [np.inf, -np.inf, np.nan])
    assert rounded[3] >= 65504


def test_random_bits_differ_between_elements_slots_and_seeds():
    bits = state_bits(7, 3, H=4, P=16, N=96)
    assert bits.shape == (4, 16, 96)
    # 6144 draws of 16 bits: an element repeated in blocks, rows or heads would leave far fewer values.
    assert len(np.unique(bits)) > 5500
    assert abs(float(bits.mean()) / 65535 - 0.5) < 0.02
    assert (bits != state_bits(8, 3, 4, 16, 96)).mean() > 0.99
    assert (bits != state_bits(7, 4, 4, 16, 96)).mean() > 0.99
    assert (bits != state_bits(7 + 2**32, 3, 4, 16, 96)).mean() > 0.99
