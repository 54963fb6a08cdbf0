"""`pallas_ssm`'s convolutions against the oracle: the XLA form, and the kernels interpreted with race detection on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_ssm
from pallas_ssm._causal_conv1d_call import Static
from pallas_ssm._causal_conv1d_launch import PREFILL, UPDATE, plan_prefill, plan_update, row_blocks
from ssm_configs import override
from ssm_configs.contracts.causal_conv1d import check_prefill, check_update

from .cases import CONV_CHANNELS, Case, select
from .compare import against_oracle
from .inputs import DTYPES, draw
from .interpret_mosaic import interpreted
from .operators import OPERATORS, oracle_results
from .runners import jax_runner

CI = [*select(op=PREFILL, tags=("ci",)), *select(op=UPDATE, tags=("ci",))]
BOTH = pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


def name_of(case: Case) -> str:
    return f"{case.op}: {case}"


def check(case: Case, implementation: str, seed: int = 0, few: bool = False) -> None:
    """`few`: so few elements that one unlucky rounding is the whole relative error, not an average over many."""
    arguments, keywords = draw(case, seed)
    run = jax_runner(OPERATORS[case.op], None, implementation == "mosaic_gpu", implementation=implementation)
    result = run(arguments, keywords)
    for comparison in against_oracle(case, arguments, keywords, result, oracle_results(case, arguments, keywords)):
        worst = comparison.error.within(comparison.worst, comparison.worst)
        assert comparison.ok or (few and not comparison.note and worst), (comparison, case)


@pytest.mark.parametrize("case", CI, ids=name_of)
def test_registry_xla(case: Case):
    check(case, "xla")


@pytest.mark.parametrize("case", [case for case in CI if "no-mosaic" not in case.tags], ids=name_of)
def test_registry_mosaic(case: Case):
    check(case, "mosaic_gpu")


@st.composite
def drawn_prefills(draw_from, channels) -> Case:
    options = draw_from(
        st.fixed_dictionaries(
            {
                "bias": st.booleans(),
                "activation": st.sampled_from([None, "silu", "swish"]),
                "spare_rows": st.integers(0, 2),
            }
        )
    )
    B, T = draw_from(st.integers(1, 2)), draw_from(st.integers(1, 40))
    states = ["none", "initial"]
    if draw_from(st.booleans()):
        lengths = draw_from(st.lists(st.integers(0, 20), min_size=1, max_size=4))
        options |= {"lengths": tuple(lengths), "tail": draw_from(st.integers(0 if sum(lengths) else 1, 3))}
        B, T = 1, sum(lengths) + options["tail"]
        states += ["pool", "padding"]
    state = draw_from(st.sampled_from(states))
    options |= {
        "initial": state == "initial",
        "pool": state in ("pool", "padding"),
        "padding": state == "padding",
    }
    D, parts = draw_from(channels)
    if parts:
        options["sizes"] = parts
        if draw_from(st.booleans()):
            options["chunk_size"] = draw_from(st.sampled_from([16, 32]))
    W = draw_from(st.integers(2, 6))
    dtype = draw_from(st.sampled_from(sorted(DTYPES)))
    return Case(PREFILL, "drawn", {"B": B, "T": T, "D": D, "W": W}, dtype, dtype, options)


@st.composite
def drawn_updates(draw_from, channels) -> Case:
    options = draw_from(
        st.fixed_dictionaries(
            {
                "bias": st.booleans(),
                "activation": st.sampled_from([None, "silu"]),
                "slots": st.booleans(),
                "spec": st.booleans(),
                "padding": st.booleans(),
            }
        )
    )
    options["padding"] &= options["slots"]
    B = draw_from(st.integers(1, 4))
    if draw_from(st.booleans()):
        lengths = draw_from(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
        options |= {"lengths": tuple(lengths), "tail": draw_from(st.integers(0, 3))}
        B = len(lengths)
    W = draw_from(st.integers(2, 6))
    dims = {"S": B + 3, "L": W - 1 + draw_from(st.integers(0, 4)), "B": B, "D": draw_from(channels), "W": W}
    dtype = draw_from(st.sampled_from(sorted(DTYPES)))
    return Case(UPDATE, "drawn", dims, dtype, dtype, options)


ODD_CHANNELS = st.sampled_from([(1, ()), (13, ()), (40, (7, 33)), (24, (8, 8, 8))])
KERNEL_CHANNELS = st.sampled_from([(64, ()), (256, ()), (128, (64, 64)), (384, (128, 256))])


@settings(max_examples=15, deadline=None)
@given(case=drawn_prefills(ODD_CHANNELS), seed=st.integers(0, 100))
def test_drawn_prefills_xla(case: Case, seed: int):
    check(case, "xla", seed, few=True)


@settings(max_examples=15, deadline=None)
@given(
    case=drawn_prefills(KERNEL_CHANNELS),
    seed=st.integers(0, 100),
    rows=st.sampled_from([4, 8, 16, 32]),
    columns=st.sampled_from([64, 128, 256]),
)
def test_drawn_prefills_and_launches_mosaic(case: Case, seed: int, rows: int, columns: int):
    with override(PREFILL, twin="pallas", BLOCK_SIZE_T=rows, BLOCK_SIZE_D=columns):
        check(case, "mosaic_gpu", seed, few=True)


@settings(max_examples=15, deadline=None)
@given(case=drawn_updates(st.integers(1, 40)), seed=st.integers(0, 100))
def test_drawn_updates_xla(case: Case, seed: int):
    check(case, "xla", seed, few=True)


@settings(max_examples=15, deadline=None)
@given(
    case=drawn_updates(st.sampled_from([128, 256])),
    seed=st.integers(0, 100),
    columns=st.sampled_from([64, 128, 256]),
    batch=st.sampled_from([1, 2, 4]),
)
def test_drawn_updates_and_launches_mosaic(case: Case, seed: int, columns: int, batch: int):
    with override(UPDATE, twin="pallas", BLOCK_SIZE_D=columns, BLOCK_SIZE_B=batch):
        check(case, "mosaic_gpu", seed, few=True)
