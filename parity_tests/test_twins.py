"""Both packages on the same inputs, each in its interpreter: against the oracle and against each other."""

import pytest

from . import report, runners
from .cases import Case, select

OP = "selective_state_update"


@pytest.fixture(scope="module")
def twins():
    return runners.twins(OP, interpret=True)


@pytest.mark.parametrize("case", select(op=OP, tags=("ci",)), ids=str)
def test_registry(case: Case, twins):
    result = report.check_case(case, twins, runners.device(interpret=True))
    assert result.ok, result.failures
    assert set(result.oracle) == set(twins) - ({"mosaic_gpu"} if "no-mosaic" in case.tags else set())
    assert result.between


def test_both_read_the_same_table(twins):
    case = next(case for case in select(op=OP, tags=("ci",)) if case.name.startswith("Nemotron-H-8B"))
    result = report.check_case(case, twins, runners.device(interpret=True))
    rows = {row[row.index("[") :] for row in result.rows.values()}
    assert len(rows) == 1 and "device_name=NVIDIA_H200,cache_dtype=float32.json key" in rows.pop()
