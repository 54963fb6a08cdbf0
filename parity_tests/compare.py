"""Errors of a result against a reference, and what may not differ at all."""

from typing import NamedTuple

import numpy as np

from .cases import Case
from .tolerances import tolerance


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


def against_oracle(case: Case, arguments, keywords, got, expected) -> list[Comparison]:
    """y and the state against the float64 definition; slots and rows that must be exact are compared bit by bit."""
    (y, state), (y_ref, state_ref) = got, expected
    before = arguments[0]
    limit = tolerance(case.op, case.dtype)
    stochastic = "rounding_seed" in keywords
    state_limit = tolerance(case.op, case.state_dtype, stochastic)

    untouched = np.array([np.array_equal(state_ref[s], before[s].astype(np.float64)) for s in range(len(before))])
    note = ""
    if before[untouched].tobytes() != state[untouched].tobytes():
        note = "a slot changed that no sequence writes"
    zero_rows = ~y_ref.any(axis=tuple(range(1, y_ref.ndim)))
    y_note = "a padding row is not zero" if np.asarray(y, np.float64)[zero_rows].any() else ""
    return [
        Comparison("y", error(y, y_ref), limit.relative, limit.worst, y_note),
        Comparison("state", error(state, state_ref), state_limit.relative, state_limit.worst, note),
    ]


def between_twins(case: Case, keywords, first, second) -> list[Comparison]:
    """The twins have the same rounding points, so they may differ by no more than one of them from the oracle."""
    stochastic = "rounding_seed" in keywords
    limits = tolerance(case.op, case.dtype), tolerance(case.op, case.state_dtype, stochastic)
    return [
        Comparison(name, error(a, b), limit.relative, limit.worst)
        for name, a, b, limit in zip(("y", "state"), first, second, limits, strict=True)
    ]
