"""The Mosaic GPU kernels of the SSD stages, interpreted with race detection on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_ssm

from .cases import SSD_STAGES, Case, select
from .compare import against_oracle
from .inputs import draw
from .interpret_mosaic import interpreted
from .operators import OPERATORS, oracle_results
from .runners import jax_runner

CI = [case for op in SSD_STAGES for case in select(op=op, tags=("ci",)) if "no-mosaic" not in case.tags]
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


@pytest.mark.parametrize("case", CI, ids=lambda case: f"{case.op}: {case}")
def test_registry(case: Case):
    arguments, keywords = draw(case)
    result = jax_runner(OPERATORS[case.op], None, True, implementation="mosaic_gpu")(arguments, keywords)
    for comparison in against_oracle(case, arguments, keywords, result, oracle_results(case, arguments, keywords)):
        assert comparison.ok, (comparison, case)
