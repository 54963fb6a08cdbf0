"""The tuner: which launch config is fastest for each size, among those that compute the right thing.

One table is one (static sizes, dtype) on one device. For each twin:

1. Every candidate is compiled ahead and checked once against the float64 definition, every result, at a middle size. Where
   time is short, some are not: candidates stand in the order in which they are worth their time.
2. Every correct candidate is timed at the op's `first_sizes` and wherever else the same compiled kernels serve (in Triton
   most sizes, in JAX none); the best of those are timed at the other sizes, with what the written rule has for each.
3. `winners.choose` picks, and each winner is checked again at its own size. One that fails there is out, and the choice
   is made anew. The fastest of a size is checked as soon as it is known, so that a tuner that is stopped has rows to write.

Every measurement is logged before the next one starts, and the table is a function of the logs of both twins.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from parity_tests.cases import Case
from ssm_configs.spec import Knobs

from . import winners
from .op import BenchOp
from .timing import Sample
from .tuning_log import TuningLog, config_of

KEEP = 3
"""Candidates that go on to a size from the nearest anchor; each of the others sends its winner."""
_BATCH = 16
"""Candidates that are compiled at once: nothing can stop the tuner meanwhile."""


class Bench(Protocol):
    """What the tuner needs of a `Lab`."""

    def compiled_case(self, case: Case) -> Case: ...

    def compile(self, pairs: Sequence[tuple[Case, Knobs | None]]) -> None: ...

    def failure(self, case: Case, knobs: Knobs | None) -> str | None: ...

    def check(self, case: Case, knobs: Knobs | None) -> tuple[str | None, dict[str, float]]: ...

    def time(self, case: Case, configs: Sequence[Knobs], repeats: int) -> list[Sample]: ...


@dataclass(frozen=True)
class Job:
    """One twin's half of one table."""

    op: BenchOp
    twin: str
    statics: Mapping[str, int]
    dtype: str
    sizes: tuple[int, ...]
    candidates: tuple[Knobs, ...] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "candidates", tuple(self.op.candidates(self.twin, self.statics, self.dtype)))

    def __str__(self) -> str:
        statics = ",".join(f"{key}={value}" for key, value in self.statics.items())
        return f"{statics},{self.op.spec.dtype_key}={self.dtype} {self.twin}"

    def case(self, size: int) -> Case:
        return self.op.case(size, self.statics, self.dtype)

    @property
    def check_size(self) -> int:
        """The middle of the op's first sizes, or what comes nearest to it."""
        middle = self.op.first_sizes[len(self.op.first_sizes) // 2]
        return min(self.sizes, key=lambda size: _distance(size, middle))

    @property
    def anchors(self) -> tuple[int, ...]:
        """The sizes nearest to the op's first sizes."""
        nearest = {min(self.sizes, key=lambda size: _distance(size, first)) for first in self.op.first_sizes}
        return tuple(sorted(nearest))

    def first_sizes(self, compiled_case: Callable[[Case], Case]) -> tuple[int, ...]:
        """Where every candidate is timed: the anchors, and all sizes that need no kernel beyond theirs."""
        compiled = {str(compiled_case(self.case(size))) for size in self.anchors}
        return tuple(size for size in self.sizes if str(compiled_case(self.case(size))) in compiled)


class TuningError(RuntimeError):
    """No candidate is left for a size."""


def tune(
    job: Job,
    bench: Bench,
    log: TuningLog,
    step: Callable[[int], Any] = lambda n: None,
    is_late: Callable[[], bool] = lambda: False,
    rule: Callable[[int], Knobs] | None = None,
) -> None:
    """Measures until `winners.from_log` has a checked winner for every size. `step(n)`: n more configs are timed.

    `is_late()`: whether to time those candidates alone that have been compiled by now. `rule(size)`: the written rule's config,
    which no table should be slower than.
    """
    cases = {size: job.case(size) for size in job.sizes}
    first = job.first_sizes(bench.compiled_case)

    correct: list[Knobs] = []
    for batch in itertools.batched(job.candidates, _BATCH):
        if correct and is_late():
            break
        _compile(bench, log, cases, [(size, knobs) for size in first for knobs in batch])
        correct += [knobs for knobs in batch if _check(bench, log, job.check_size, cases, knobs) is None]
    # Large sizes first: their buffers then serve the small ones.
    for size in sorted(first, reverse=True):
        _time(job, bench, log, cases, size, correct, step)
        _check_fastest(bench, log, size, cases)

    rest = [size for size in job.sizes if size not in first]
    finalists = {size: _finalists(log, size, job.anchors, correct)[: 1 if is_late() else None] for size in rest}
    if rule is not None and not is_late():
        for size, configs in finalists.items():
            if config_of(rule(size)) not in map(config_of, configs):
                configs.append(rule(size))
    _compile(bench, log, cases, [(size, knobs) for size in rest for knobs in finalists[size]])
    for size in sorted(rest, reverse=True):
        _time(job, bench, log, cases, size, finalists[size], step)
        _check_fastest(bench, log, size, cases)

    while True:
        chosen = winners.from_log(log, job.sizes)
        if chosen is None:
            raise TuningError(
                f"{job}: no candidate computes the right thing at every size; {log.path} says what failed"
            )
        unchecked = [(size, config) for size, config in chosen.items() if (size, config) not in log.verdicts]
        if not unchecked:
            return
        for size, config in sorted(unchecked, reverse=True):
            _check(bench, log, size, cases, dict(config))


def is_complete(log: TuningLog, sizes: Sequence[int]) -> bool:
    chosen = winners.from_log(log, sizes)
    return chosen is not None and all((size, config) in log.verdicts for size, config in chosen.items())


def tried(job: Job, log: TuningLog) -> int:
    """How many of a job's candidates were timed or found wrong."""
    known = {config for times in log.times.values() for config in times}
    known |= {config for (_, config), wrong in log.verdicts.items() if wrong is not None}
    return sum(config_of(knobs) in known for knobs in job.candidates)


def repeats(floor_us: float) -> int:
    """Enough for a median; a long kernel needs fewer, for its clock is finer and its noise smaller."""
    return 15 if floor_us < 1000 else 7 if floor_us < 5000 else 5


def floor_us(op: BenchOp, case: Case) -> float:
    """A rough one, at 4 TB/s, for choosing repeats and estimating how long tuning takes."""
    return op.bytes_moved(case) / 4e6


def timed_configs(job: Job, compiled_case: Callable[[Case], Case]) -> dict[int, int]:
    """How many configs are timed at each size, at most."""
    first = job.first_sizes(compiled_case)
    finalists = min(len(job.candidates), KEEP + len(job.anchors) - 1) + 1  # the rule's
    return {size: len(job.candidates) if size in first else finalists for size in job.sizes}


def estimate_seconds(job: Job, compiled_case: Callable[[Case], Case]) -> float:
    """How long a job takes, to within a factor of two."""
    timed = timed_configs(job, compiled_case)
    compiles: dict[str, int] = {}
    seconds = 0.0
    for size, n in timed.items():
        case = job.case(size)
        kernel = str(compiled_case(case))
        compiles[kernel] = max(n, compiles.get(kernel, 0))
        us = floor_us(job.op, case)
        # a session, each repeat with its flush and waits, and the float64 check of the winner
        seconds += 0.05 + n * repeats(us) * (1.3 * us + 250) / 1e6 + (50 * us + 20_000) / 1e6
    # threads help little: most of a compile is Python
    return seconds + 0.12 * sum(compiles.values())


def _distance(size: int, other: int) -> float:
    return abs(math.log(size / other))


def _finalists(log: TuningLog, size: int, anchors: Sequence[int], correct: Sequence[Knobs]) -> list[Knobs]:
    by_distance = sorted(anchors, key=lambda other: _distance(size, other))
    ranked = {other: sorted(correct, key=lambda knobs: _logged(log, other, knobs)) for other in by_distance}
    best = [ranked[other][: KEEP if other == by_distance[0] else 1] for other in by_distance]
    return [dict(config) for config in dict.fromkeys(config_of(knobs) for knobs in itertools.chain(*best))]


def _logged(log: TuningLog, size: int, knobs: Knobs) -> float:
    return log.times.get(size, {}).get(config_of(knobs), math.inf)


def _compile(bench: Bench, log: TuningLog, cases: Mapping[int, Case], pairs: Sequence[tuple[int, Knobs]]) -> None:
    """What the log does not answer yet."""
    bench.compile([(cases[size], knobs) for size, knobs in pairs if _logged(log, size, knobs) == math.inf])


def _check(bench: Bench, log: TuningLog, size: int, cases: Mapping[int, Case], knobs: Knobs) -> str | None:
    try:
        return log.verdict(size, knobs)
    except KeyError:
        log.start_check(size, knobs)
        wrong, errors = bench.check(cases[size], knobs)
        log.add_verdict(size, knobs, wrong, errors=errors)
        return wrong


def _check_fastest(bench: Bench, log: TuningLog, size: int, cases: Mapping[int, Case]) -> None:
    """Until one passes."""
    for config in sorted(log.times.get(size, {}), key=log.times.get(size, {}).__getitem__):
        if log.verdicts.get((size, config)) is None and _check(bench, log, size, cases, dict(config)) is None:
            return


def _time(
    job: Job,
    bench: Bench,
    log: TuningLog,
    cases: Mapping[int, Case],
    size: int,
    configs: Sequence[Knobs],
    step: Callable[[int], Any],
) -> None:
    case, todo = cases[size], []
    for knobs in configs:
        if _logged(log, size, knobs) != math.inf:
            continue
        if failure := bench.failure(case, knobs):
            log.add_verdict(size, knobs, failure)
        else:
            todo.append(knobs)
    if todo:
        samples = bench.time(case, todo, repeats(floor_us(job.op, case)))
        for knobs, sample in zip(todo, samples, strict=True):
            log.add_time(size, knobs, us=sample.us, us_p20=sample.us_p20, us_p80=sample.us_p80, kernels=sample.kernels)
    step(len(configs))
