"""Errors of a result against a reference, and what may not differ at all."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .cases import Case
from .operators import OPERATORS, Results
from .tolerances import Tolerance, tolerance


class Error(NamedTuple):
    relative: float
    """‖got - ref‖₂ / ‖ref‖₂"""
    worst: float
    """max |got - ref| / max |ref|"""

    def within(self, relative: float, worst: float) -> bool:
        return self.relative <= relative and self.worst <= worst  # False for NaN


def error(got: np.ndarray, ref: np.ndarray) -> Error:
    got, ref = np.asarray(got, np.float64), np.asarray(ref, np.float64)
    if got.shape != ref.shape:
        raise ValueError(f"got: expected shape {ref.shape}, got {got.shape}")
    difference = np.abs(got - ref)
    if not ref.size:
        return Error(0.0, 0.0)
    if not ref.any():  # nothing to be relative to: any difference (or NaN) is the whole of it
        wrong = float("inf") if difference.any() else 0.0
        return Error(wrong, wrong)
    return Error(float(np.linalg.norm(difference) / np.linalg.norm(ref)), float(difference.max() / np.abs(ref).max()))


class Comparison(NamedTuple):
    """One output of one implementation against the oracle (or of one twin against the other)."""

    output: str
    error: Error
    relative: float
    worst: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return not self.note and self.error.within(self.relative, self.worst)


def against_oracle(
    case: Case, arguments: tuple[np.ndarray, ...], keywords: Mapping[str, Any], got: Results, expected: Results
) -> list[Comparison]:
    """Every result against the float64 definition; slots and rows that must be exact are compared bit by bit."""
    if got.keys() != expected.keys():
        raise ValueError(f"results: expected {', '.join(expected)}, got {', '.join(got)}")
    comparisons = []
    for name, limit in _limits(case, keywords, got):
        note = ""
        if np.isnan(expected[name]).any():  # what has no meaning, such as a slot that no chunk stands in
            meant = ~np.isnan(expected[name])
            got = {**got, name: np.asarray(got[name], np.float64)[meant]}
            expected = {**expected, name: expected[name][meant]}
        if name == "state":
            note = _state_note(case, arguments, keywords, got[name], expected[name])
        elif name.startswith("y"):
            zero_rows = ~expected[name].any(axis=-1)
            if np.asarray(got[name], np.float64)[zero_rows].any():
                note = "a row without a token is not zero"
        comparisons.append(Comparison(name, error(got[name], expected[name]), limit.relative, limit.worst, note))
    return comparisons


def between_twins(
    case: Case, keywords: Mapping[str, Any], first: Results, second: Results, expected: Results
) -> list[Comparison]:
    """The twins have the same rounding points, so they may differ by no more than one of them from the oracle.

    `expected` says by NaN which elements have no meaning.
    """
    comparisons = []
    for name, limit in _limits(case, keywords, first):
        pair = [np.asarray(results[name], np.float64)[~np.isnan(expected[name])] for results in (first, second)]
        comparisons.append(Comparison(name, error(*pair), limit.relative, limit.worst))
    return comparisons


def _limits(case: Case, keywords: Mapping[str, Any], results: Results) -> list[tuple[str, Tolerance]]:
    operator, limits = OPERATORS[case.op], []
    for name in results:
        stochastic = name == "state" and "rounding_seed" in keywords
        found = [tolerance(case.op, dtype, stochastic) for dtype in operator.rounded_to(case, name.partition("[")[0])]
        limits.append((name, max(found)))
    return limits


def _state_note(
    case: Case, arguments: tuple[np.ndarray, ...], keywords: Mapping[str, Any], got: np.ndarray, expected: np.ndarray
) -> str:
    operator = OPERATORS[case.op]
    if operator.exact_state:
        return "" if got.tobytes() == expected.tobytes() else "the state is not a copy of the inputs, bit for bit"
    assert operator.mutated is not None
    before = arguments[operator.mutated]
    untouched = np.array([np.array_equal(expected[s], before[s].astype(np.float64)) for s in range(len(before))])
    return "" if before[untouched].tobytes() == got[untouched].tobytes() else "a slot changed that no sequence writes"
