"""The parity report: every case through both twins, against the oracle and against each other."""

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np

import ssm_configs

from .cases import Case
from .compare import Comparison, against_oracle, between_twins
from .inputs import draw
from .operators import OPERATORS, oracle_results
from .runners import Runner

KERNELS = ("triton", "mosaic_gpu")


@dataclass
class CaseReport:
    """What one case gave. `failures` holds what is wrong in words; nothing there means the case passed."""

    case: Case
    oracle: dict[str, list[Comparison]] = field(default_factory=dict)
    """Implementation -> its outputs against the oracle."""
    between: list[Comparison] = field(default_factory=list)
    """Pallas twin against Triton twin."""
    rows: dict[str, str] = field(default_factory=dict)
    """Implementation -> the table row that its launch parameters came from."""
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.failures


def check_case(case: Case, runners: Mapping[str, Runner], device: ssm_configs.Device) -> CaseReport:
    report = CaseReport(case)
    start = time.perf_counter()
    arguments, keywords = draw(case)
    expected = oracle_results(case, arguments, keywords)

    results: dict[str, dict[str, np.ndarray]] = {}
    for name, run in runners.items():
        try:
            results[name] = run(arguments, keywords)
        except NotImplementedError as error:
            if "no-mosaic" not in case.tags or name != "mosaic_gpu":
                report.failures.append(f"{name}: NotImplementedError: {error}")
            else:
                report.notes.append(f"{name}: {error}")
            continue
        except Exception as error:  # a crash of one case must not hide the others
            report.failures.append(
                f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        report.oracle[name] = against_oracle(case, arguments, keywords, results[name], expected)
        for comparison in report.oracle[name]:
            _judge(report, f"{name} against the oracle", comparison)
        if name in KERNELS:
            report.rows[name] = table_row(case, name, device)
    pallas = "mosaic_gpu" if "mosaic_gpu" in results else "xla"
    if "triton" in results and pallas in results:
        report.between = between_twins(case, keywords, results[pallas], results["triton"], expected)
        for comparison in report.between:
            _judge(report, f"{pallas} against triton", comparison)
    report.seconds = time.perf_counter() - start
    return report


def _judge(report: CaseReport, what: str, comparison: Comparison) -> None:
    if comparison.note:
        report.failures.append(f"{what}: {comparison.output}: {comparison.note}")
    elif not comparison.ok:
        relative, worst = comparison.error
        report.failures.append(
            f"{what}: {comparison.output}: error {relative:.1e} (worst element {worst:.1e}), "
            f"tolerance {comparison.relative:.1e} ({comparison.worst:.1e})"
        )


def table_row(case: Case, implementation: str, device: ssm_configs.Device) -> str:
    """The launch parameters of a case, and the file and key they came from."""
    operator = OPERATORS[case.op]
    size, statics = operator.sizes(case)
    config = ssm_configs.lookup(
        operator.table,
        twin="triton" if implementation == "triton" else "pallas",
        device=device,
        dtype=operator.table_dtype(case),
        size=size,
        **statics,
    )
    knobs = " ".join(f"{name}={value}" for name, value in config.items())
    where = config.source if config.path is None else f"{config.source} {Path(config.path).name} key {config.key}"
    return f"{knobs} [{where}]"


def run(
    cases: Iterable[Case],
    implementations: Mapping[str, Mapping[str, Runner]],
    device: ssm_configs.Device,
    show: Callable[[CaseReport], None],
) -> list[CaseReport]:
    """`implementations` by operator and name."""
    reports = []
    for case in cases:
        reports.append(check_case(case, implementations[case.op], device))
        show(reports[-1])
    return reports


def lines(report: CaseReport) -> Iterator[str]:
    """A case for the terminal."""
    yield f"{'ok  ' if report.ok else 'FAIL'} {report.case.op}  {report.case}  ({report.seconds:.1f} s)"
    for name, comparisons in report.oracle.items():
        yield f"       {name:<10} vs oracle  {_errors(comparisons)}"
    if report.between:
        yield f"       {'twins':<10} vs twin    {_errors(report.between)}"
    for name, row in report.rows.items():
        yield f"       {name:<10} launched   {row}"
    for note in report.notes:
        yield f"       not run: {note}"
    for failure in report.failures:
        yield f"  !!   {failure}"


def _errors(comparisons: list[Comparison]) -> str:
    return "   ".join(f"{c.output} {c.error.relative:.1e} (tolerance {c.relative:.1e})" for c in comparisons)


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        package: metadata.version(package) for package in ("jax", "torch", "triton", "numpy")
    }
