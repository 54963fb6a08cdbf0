"""Two heads a thread block in the fused Mosaic GPU path, and end states that several thread blocks share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_ssm.ssd import _fused
from pallas_ssm.ssd._dispatch import prepare_combined
from pallas_ssm.ssd._fused_block import Block
from pallas_ssm.ssd._fused_pieces import CHUNK, cut

from .cases import Case
from .compare import against_oracle
from .inputs import draw
from .operators import OPERATORS, oracle_results
from .runners import jax_runner
from .test_pallas_ssd_fused import CONFIG, H200, OP, drawn, small, static_of

TWO = {"HEADS_PER_BLOCK": 2}


def launched(**knobs: Any) -> Callable[..., tuple[Any, ...]]:
    """The operator with this launch."""

    def call(*operands: Any, **keywords: Any) -> tuple[Any, ...]:
        prepared = prepare_combined(**dict(zip(("x", "dt", "A", "B", "C"), operands, strict=True)), **keywords)
        static: Any = prepared.static
        launch = _fused.plan(static, H200, CONFIG | knobs)
        assert launch.HEADS_PER_BLOCK == knobs.get("HEADS_PER_BLOCK", 1)
        y, final, intermediate = _fused.run(static, launch, *prepared.operands())
        return (y, final, intermediate) if static.return_intermediate_states else (y, final)

    return call


def results(case: Case, arguments: Any, keywords: Any, **knobs: Any) -> dict[str, np.ndarray]:
    return jax_runner(OPERATORS[OP], launched(**knobs), True)(arguments, keywords)


def check(case: Case, seed: int = 0, **knobs: Any) -> None:
    arguments, keywords = draw(case, seed)
    result = results(case, arguments, keywords, **knobs)
    for comparison in against_oracle(case, arguments, keywords, result, oracle_results(case, arguments, keywords)):
        assert comparison.ok, (comparison, case)


@settings(max_examples=4, deadline=None)
@given(case=drawn(), seed=st.integers(0, 100), groups=st.integers(1, 2), piece=st.sampled_from([1, 2, 65536]))
def test_drawn_calls(case: Case, seed: int, groups: int, piece: int):
    check(case.with_dims(G=groups, H=2 * groups), seed, CHUNKS_PER_PIECE=piece, STATES_PER_PIECE=2, **TWO)


@pytest.mark.parametrize(
    ("lengths", "knobs"),
    [(None, {}), ((70, 0, 133), {"CHUNKS_PER_PIECE": 2, "STATES_PER_PIECE": 2, "num_stages": 2})],
    ids=["whole", "packed pieces"],
)
def test_a_head_has_the_same_bits_alone_and_in_company(
    lengths: tuple[int, ...] | None, knobs: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    # XLA on a CPU adds selected numbers in another order than products with ones.
    feed = Block.feed
    monkeypatch.setattr(Block, "feed", lambda block, triangle=True: feed(block, triangle=False))
    case = small(lengths, z=True, return_intermediate_states=True).with_dims(H=4, G=2)
    arguments, keywords = draw(case)
    alone, both = (results(case, arguments, keywords, HEADS_PER_BLOCK=heads, **knobs) for heads in (1, 2))
    for name, array in alone.items():
        assert array.tobytes() == both[name].tobytes(), name


def test_several_end_states_a_piece_carry_a_slow_state():
    """Three chunks a piece in shares of two and one."""
    for case in (small((330, 0, 70), return_intermediate_states=True), small(None, 390)):
        check(case, CHUNKS_PER_PIECE=3, STATES_PER_PIECE=2, **TWO)


def test_launches():
    both = _fused.plan(
        static_of(T=8192, H=80, N=128), H200, CONFIG | TWO | {"CHUNKS_PER_PIECE": 43, "STATES_PER_PIECE": 4}
    )
    assert (both.HEADS_PER_BLOCK, both.STATES_PER_PIECE, both.num_stages, both.scores) == (2, 4, 3, 1)
    assert _fused.plan(static_of(H=6, G=2), H200, CONFIG | TWO).HEADS_PER_BLOCK == 1  # three heads a group
    assert _fused.plan(static_of(N=256), H200, CONFIG | TWO).HEADS_PER_BLOCK == 1
    assert _fused.plan(static_of(), H200, CONFIG | {"STATES_PER_PIECE": 4}).STATES_PER_PIECE == 1  # nothing to hand on
    assert _fused.plan(static_of(), H200, CONFIG).HEADS_PER_BLOCK == 1


@settings(deadline=None)
@given(piece=st.integers(1, 200), shares=st.integers(1, 8))
def test_every_share_of_a_piece_has_a_chunk(piece: int, shares: int):
    pieces = cut(static_of(T=CHUNK * 201), piece, shares)
    assert 1 <= pieces.shares <= min(piece, shares)
    assert pieces.share_tokens % CHUNK == 0
    assert (pieces.shares - 1) * pieces.share_tokens < pieces.tokens <= pieces.shares * pieces.share_tokens
