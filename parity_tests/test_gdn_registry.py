"""The gated delta rule's part of the registry: its cases are drawn, called and judged as they say."""

import numpy as np
import pytest

from . import runners
from .cases import GDN_MODELS, GDN_STAGES, Case, select
from .cases_gdn import CHUNKED, RECURRENT
from .compare import against_oracle
from .inputs import draw
from .operators import OPERATORS, oracle_results
from .oracle.chunks import chunks
from .tolerances import tolerance

OPS = (*GDN_STAGES, CHUNKED, RECURRENT)
CI = [case for op in OPS for case in select(op=op, tags=("ci",))]


def one(op: str, name: str) -> Case:
    (case,) = (case for case in select(op=op) if case.name == name)
    return case


def test_every_model_and_rank_is_there():
    heads = {(case.dims["H_k"], case.dims["H_v"]) for case in select(op=CHUNKED, tags=("standard",))}
    assert {(model.H_k, model.H_v) for model in GDN_MODELS} | {(8, 16), (4, 8), (2, 4), (2, 8)} <= heads
    assert {case.op for case in CI} == set(OPS)
    assert {case.dims["L"] for case in CI if case.op == CHUNKED} == {16, 32, 64}
    assert {case.dtype for case in CI if case.op == CHUNKED} == {"float32", "bfloat16", "float16"}
    # Of two cases of one operator, name and dtype tell which.
    keys = [(case.op, case.name, case.dtype, case.state_dtype) for op in OPS for case in select(op=op)]
    assert len(set(keys)) == len(keys)


def test_every_result_has_a_tolerance():
    for op in OPS:
        for case in select(op=op):
            for output in OPERATORS[op].outputs:
                limits = [tolerance(op, dtype) for dtype in OPERATORS[op].rounded_to(case, output)]
                assert limits and all(limit.measured < limit.relative < limit.worst for limit in limits)


@pytest.mark.parametrize("case", CI, ids=lambda case: f"{case.op}: {case}")
def test_the_report_names_the_row_that_a_call_asks_for(case: Case):
    from triton_ssm._explain import _OPS

    operator, (arguments, keywords) = OPERATORS[case.op], draw(case)
    table, request = _OPS[case.op]
    tensors = [runners.to_torch(value, "cpu") for value in arguments]
    asked = request(*tensors, **{name: runners.to_torch(value, "cpu") for name, value in keywords.items()})
    size, statics = operator.sizes(case)
    assert table == operator.table and (size, operator.table_dtype(case)) == (asked["size"], asked["dtype"])
    assert {name: asked[name] for name in statics} == statics


def test_draws_are_what_the_case_says():
    for case in CI:
        first, again = draw(case), draw(case)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first[0], again[0], strict=True))
    (_, k, _, g, beta), _ = draw(one(CHUNKED, "K=60 V=100"))
    assert g.max() < 0 and 0 < beta.min() and beta.max() < 1
    np.testing.assert_allclose(np.linalg.norm(k.astype(np.float32), axis=-1), 1, rtol=1e-2)
    (*_, g, _), _ = draw(one(CHUNKED, "chunks of 32, fp16, gates of either sign"))
    assert g.min() < 0 < g.max()
    (_, k, _, g, beta), _ = draw(next(c for c in CI if c.op == CHUNKED and "resembling" in c.options))
    cosines = np.einsum("td,sd->ts", k[0, :, 0], k[0, :, 0])
    assert cosines.min() > 0.99 and beta.min() > 0.99 and g.min() > -1e-3


def test_slots_without_a_chunk_are_poisoned_for_chunk_o():
    case = one("gdn.chunk_o", "packed")
    (*_, h), keywords = draw(case)
    NC, found = chunks(1, case.dims["T"], 64, keywords["cu_seqlens"])
    used = sorted(chunk.slot for chunk in found)
    meant = ~np.isnan(h.astype(np.float32)).any(axis=(0, 2, 3, 4))
    assert len(used) < NC and np.flatnonzero(meant).tolist() == used


def _judged(case: Case, wrong) -> list[bool]:
    """Whether each result passes once `wrong` has been at what the definition gives."""
    arguments, keywords = draw(case)
    expected = oracle_results(case, arguments, keywords)
    # What is stored in place is of the pool's dtype: slots that nobody writes are compared to the bit.
    position = OPERATORS[case.op].mutated
    stored = {} if position is None else {"state": arguments[position].dtype}
    got = {name: result.astype(stored.get(name, result.dtype)) for name, result in expected.items()}
    wrong(got)
    return [comparison.ok for comparison in against_oracle(case, arguments, keywords, got, expected)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_wrong_result_does_not_pass():
    packed = one(CHUNKED, "packed, everything")
    assert _judged(packed, lambda got: None) == [True, True]
    assert _judged(packed, lambda got: got["y"][0, -1].fill(1e-6)) == [False, True]  # a row without a token
    assert _judged(packed, lambda got: got["final"][1].fill(0)) == [True, False]  # a sequence of no tokens hands its on
    assert _judged(packed, lambda got: got["y"][0, 66:75].fill(np.nan)) == [False, True]
    h = one("gdn.chunk_delta_h", "packed")
    assert _judged(h, lambda got: got["h"][:, 2].fill(7.0)) == [True, True, True]  # no chunk stands there
    assert _judged(h, lambda got: got["h"][:, 0].fill(7.0)) == [False, True, True]
    decode = one(RECURRENT, "destination slots, padding and null slot")
    assert _judged(decode, lambda got: None) == [True, True]
    untouched = draw(decode)[1]["state_indices"][1]  # it is read, and another one is written
    assert _judged(decode, lambda got: np.multiply(got["state"][untouched], 1.01, got["state"][untouched])) == [
        True,
        False,
    ]
