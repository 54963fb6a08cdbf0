"""Both packages on the same inputs, each in its interpreter: against the oracle and against each other."""

import pytest

from . import report, runners
from .cases import Case, select
from .operators import OPERATORS


@pytest.fixture(scope="module")
def twins():
    return {op: runners.twins(op, interpret=True) for op in OPERATORS}


@pytest.mark.parametrize("case", select(tags=("ci",)), ids=lambda case: f"{case.op}: {case}")
def test_registry(case: Case, twins):
    result = report.check_case(case, twins[case.op], runners.device(interpret=True))
    assert result.ok, result.failures
    assert set(result.oracle) == set(twins[case.op]) - ({"mosaic_gpu"} if "no-mosaic" in case.tags else set())
    assert result.between


def test_both_read_the_same_table(twins):
    cases = select(op="selective_state_update", tags=("ci",))
    case = next(case for case in cases if case.name.startswith("Nemotron-H-8B"))
    result = report.check_case(case, twins[case.op], runners.device(interpret=True))
    rows = {row[row.index("[") :] for row in result.rows.values()}
    assert len(rows) == 1 and "device_name=NVIDIA_H200,cache_dtype=float32.json key" in rows.pop()
