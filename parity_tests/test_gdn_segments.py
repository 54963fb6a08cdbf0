"""Where the fused gated delta rule cuts long sequences of few heads, and that what a segment does to a state is linear."""

import itertools

import numpy as np
import pytest

from ssm_configs.contracts.gdn_segments import COLUMNS, segment_chunks

from .oracle import gdn as oracle

SMS = 132
CHUNKS = (1, 2, 16, 51, 64, 100, 128, 129, 512, 4096)
SHAPES = [*itertools.product((1, 2, 5), (2, 4, 6, 8, 16, 32), (64, 128), (64, 128))]


def segments(chunks: int, length: int) -> int:
    return -(-chunks // length)


@pytest.mark.parametrize(("H_v", "K", "V"), [(32, 128, 128), (64, 128, 128), (33, 64, 128), (34, 128, 64)])
def test_many_heads_stay_whole(H_v, K, V):
    assert all(segment_chunks(1, H_v, K, V, chunks) == chunks for chunks in CHUNKS)
    assert all(segment_chunks(H_v // 2, 4, K, V, chunks) == chunks for chunks in CHUNKS)


def test_short_sequences_stay_whole():
    assert all(segment_chunks(1, 2, 128, 128, chunks) == chunks for chunks in range(33))


def test_few_heads_are_cut():
    for H_v, at_least in ((2, 8), (4, 6), (8, 4), (16, 3)):
        assert segments(512, segment_chunks(1, H_v, 128, 128, 512)) >= at_least


@pytest.mark.parametrize("sms", [SMS, 78])
def test_all_programs_of_either_pass_run_at_once(sms):
    for (rows, H_v, K, V), chunks in itertools.product(SHAPES, CHUNKS):
        length = segment_chunks(rows, H_v, K, V, chunks, sms)
        count = segments(chunks, length)
        if count > 1:
            assert max((count - 1) * (K + V), count * V) * rows * H_v <= sms * COLUMNS
            assert (count - 1) * length < chunks, "a segment without a chunk"


def test_longer_sequences_and_fewer_heads_are_cut_sooner():
    for rows, H_v, K, V in SHAPES:
        cut = [chunks for chunks in range(1, 300) if segment_chunks(rows, H_v, K, V, chunks) < chunks]
        # Segments are as long as the longest: where their number does not divide the chunks, a few chunks more may be none.
        assert not cut or (cut[-1] == 299 and all(b - a <= 1 for a, b in itertools.pairwise(cut) if a > 1.2 * cut[0]))
        for chunks in CHUNKS:
            more = segments(chunks, segment_chunks(rows, H_v, K, V, chunks))
            assert more >= segments(chunks, segment_chunks(rows + 1, H_v, K, V, chunks))
            assert more >= segments(chunks, segment_chunks(rows, 2 * H_v, K, V, chunks))


def test_nothing_is_cut_into_nothing():
    for rows, chunks in itertools.product((0, 1), (0, 1)):
        assert segment_chunks(rows, 8, 128, 128, chunks) == chunks
    assert 0 < segment_chunks(0, 8, 128, 128, 128) <= 128


@pytest.mark.parametrize("length", [1, 20, 39, 60])
def test_segments_come_to_the_same_as_the_whole(length):
    """Gates of both signs, a tail, a state to start from."""
    rng = np.random.default_rng(0)
    T, H_v, K, V = 60, 2, 6, 5
    q, k = rng.standard_normal((2, 1, T, 1, K)) / np.sqrt(K)
    v, state = rng.standard_normal((1, T, H_v, V)), rng.standard_normal((1, H_v, K, V))
    g, beta = rng.uniform(-0.3, 0.1, (1, T, H_v)), rng.uniform(0, 1, (1, T, H_v))
    expected, final = oracle.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state)
    found = []
    one = np.broadcast_to(np.eye(K), (1, H_v, K, K))
    for begin in range(0, T, length):
        part = [x[:, begin : begin + length] for x in (q, k, v, g, beta)]
        found.append(oracle.chunk_gated_delta_rule(*part, initial_state=state)[0])
        E = oracle.chunk_gated_delta_rule(*part)[1]
        part[2] = np.zeros((*part[2].shape[:3], K))
        state = oracle.chunk_gated_delta_rule(*part, initial_state=one)[1] @ state + E
    np.testing.assert_allclose(np.concatenate(found, 1), expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(state, final, rtol=1e-9, atol=1e-11)
