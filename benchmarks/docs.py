"""`python -m benchmarks docs`: writes what in docs/ follows from code and results: support.md, the tolerances in numerics.md
and how rows travel in tuning.md.

Which implementation a call gets is asked of the package itself, for a model's shape on each device.
"""

import argparse
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from parity_tests.cases import Case, select
from parity_tests.inputs import draw
from parity_tests.operators import OPERATORS
from parity_tests.tolerances import TOLERANCES
from ssm_configs import SPECS, OpSpec, TableWarning, shipped_tables

FOLDER = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- tolerances -->\n", "<!-- /tolerances -->"
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = {
    "sm_90": ("NVIDIA H200", "9.0"),
    "sm_100": ("NVIDIA B200", "10.0"),
    "sm_120": ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "12.0"),
}
# A prompt's length has no say in what serves it.
_TOKENS = 256
_HEAD = """# What is supported where

This page is written by `python -m benchmarks docs` from the contracts, the tuning-table declarations and the packages' own
answers; a test fails when it is stale.

`triton_ssm` runs every operator below with every option of its own on any GPU that Triton compiles for, and in Triton's
interpreter on a CPU (`TRITON_INTERPRET=1`). It has no gradients: asking for one is a clear error.

`pallas_ssm` with `implementation="xla"` runs every operator with every option of its own on any device that JAX has, and
is differentiable. `"mosaic_gpu"` is the Pallas kernel; its backward is XLA's. `None`, the default, takes the kernel where it
serves a call and XLA elsewhere. `pallas_ssm.explain(...)` answers for a call of your own.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is stale")


def validate(arguments: argparse.Namespace) -> None:
    """Nothing that argparse cannot see."""


def main(arguments: argparse.Namespace) -> int:
    stale = False
    for name, text in pages().items():
        path = FOLDER / name
        fresh = path.exists() and path.read_text("utf-8") == text
        stale |= not fresh
        if not fresh and not arguments.check:
            path.write_text(text, "utf-8")
        state = (
            "up to date" if fresh else "stale; `python -m benchmarks docs` writes it" if arguments.check else "written"
        )
        print(f"docs/{name}: {state}")
    return 1 if stale and arguments.check else 0


def pages() -> dict[str, str]:
    """File name -> text, as it should be."""
    from .report import sources, transferred
    from .table import RESULTS

    transfer = sources.load(RESULTS / "NVIDIA_H200").transfer
    return {
        "support.md": support(),
        "numerics.md": with_tolerances((FOLDER / "numerics.md").read_text("utf-8")),
        "tuning.md": transferred.with_table((FOLDER / "tuning.md").read_text("utf-8"), transfer),
    }


def with_tolerances(text: str) -> str:
    """The text with the table put between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"numerics.md: expected {BEGIN.strip()} and {END}")
    rows = [
        [
            f"`{op}`",
            dtype,
            f"{limit.relative:.1e}",
            f"{limit.worst:.1e}",
            f"{limit.measured:.1e}" if limit.measured else "",
        ]
        for (op, dtype), limit in TOLERANCES.items()
    ]
    header = ["operator", "rounded to", "relative", "worst", "largest measured"]
    return before + BEGIN + "\n".join(_table(header, rows)) + "\n" + END + after


def support() -> str:
    return "\n".join([_HEAD, *_choices(), *(line for op in OPERATORS for line in _operator(op))]) + "\n"


def choices(op: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(architecture, dtype) -> (implementation, reason) of `implementation=None`, for a model's shape."""
    import pallas_ssm

    found = {}
    for dtype in DTYPES:
        arguments, keywords = _call(op, dtype)
        for architecture, (name, capability) in DEVICES.items():
            device = SimpleNamespace(platform="gpu", device_kind=name, compute_capability=capability)
            # Stands for an argument that lies on that device, which this machine need not have.
            with mock.patch("pallas_ssm._device._committed", lambda arrays, device=device: device):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", TableWarning)
                    answer = pallas_ssm.explain(op, *arguments, **keywords)
            found[architecture, dtype] = answer.implementation, answer.reason
    return found


def shape_of(op: str) -> Case:
    """A model's, short where it can be: nothing is computed."""
    case = next((case for case in select(op=op, tags=("standard",)) if "lengths" not in case.options), None)
    case = case or select(op=op, tags=("standard",))[0]
    return case.with_dims(T=_TOKENS) if "T" in case.dims and "lengths" not in case.options else case


def _call(op: str, dtype: str) -> tuple[list[Any], dict[str, Any]]:
    """Shapes and dtypes alone."""
    import jax
    import numpy as np

    def outline(value: Any) -> Any:
        return jax.ShapeDtypeStruct(value.shape, value.dtype) if isinstance(value, np.ndarray) else value

    arguments, keywords = draw(replace(shape_of(op), dtype=dtype))
    return [outline(value) for value in arguments], {name: outline(value) for name, value in keywords.items()}


def _choices() -> Iterator[str]:
    yield "## What `implementation=None` takes on a GPU\n"
    yield "For a model's shape, in the last column, and the dtype of the inputs. Numbers refer to the reasons below.\n"
    reasons: dict[str, int] = {}
    lines = []
    for op in OPERATORS:
        found = choices(op)
        cells = [_cell(found, architecture, reasons) for architecture in DEVICES]
        case = shape_of(op)
        shape = " ".join(f"{key}={value}" for key, value in case.dims.items())
        lines.append([f"`{op}`", *cells, f"{case.name}: {shape}"])
    yield from _table(["operator", *DEVICES, "shape"], lines)
    if reasons:
        yield "\nWhy XLA:\n"
        yield from (f"{number}. {_shown(reason)}" for reason, number in reasons.items())
    yield ""


def _cell(found: dict[tuple[str, str], tuple[str, str]], architecture: str, reasons: dict[str, int]) -> str:
    """ "mosaic_gpu", or by dtype."""
    by_answer: dict[str, list[str]] = {}
    for dtype in DTYPES:
        implementation, reason = found[architecture, dtype]
        answer = "kernel" if implementation == "mosaic_gpu" else f"XLA ({reasons.setdefault(reason, len(reasons) + 1)})"
        by_answer.setdefault(answer, []).append(dtype)
    if len(by_answer) == 1:
        return next(iter(by_answer))
    return "; ".join(f"{', '.join(dtypes)}: {answer}" for answer, dtypes in by_answer.items())


def _shown(reason: str) -> str:
    return reason[0].upper() + reason[1:].rstrip(".") + "."


def _operator(op: str) -> Iterator[str]:
    yield f"## `{op}`\n"
    yield from _arguments(op)
    if op == "causal_conv1d":
        yield "- `causal_conv1d_split(x, weight, sizes, ...)` is the same, its output in parts, in chunk-aligned rows if asked"
    if spec := SPECS.get(OPERATORS[op].table):
        yield from _tuning(spec)
    yield ""


def _arguments(op: str) -> Iterator[str]:
    import pallas_ssm
    import triton_ssm

    twins = [
        inspect.signature(OPERATORS[op].function(package, {})).parameters.values()
        for package in (triton_ssm, pallas_ssm)
    ]
    torch, jax = ([parameter for parameter in twin if parameter.kind is parameter.KEYWORD_ONLY] for twin in twins)
    required = [parameter.name for parameter in twins[0] if parameter.kind is not parameter.KEYWORD_ONLY]
    yield f"- required: {_names(required)}"
    shared = {parameter.name for parameter in torch} & {parameter.name for parameter in jax}
    for title, parameters in (
        ("options", [parameter for parameter in torch if parameter.name in shared]),
        ("in `triton_ssm` alone", [parameter for parameter in torch if parameter.name not in shared]),
        ("in `pallas_ssm` alone", [parameter for parameter in jax if parameter.name not in shared]),
    ):
        if parameters:
            yield f"- {title}: {', '.join(_default(parameter) for parameter in parameters)}"


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return f"`{parameter.name}` (required)"
    return f"`{parameter.name}`" if parameter.default is None else f"`{parameter.name}={_value(parameter.default)}`"


def _value(value: Any) -> str:
    """Dtypes are named differently, and mean the same."""
    name = getattr(value, "__name__", None) or str(value)
    return re.sub(r"^torch\.", "", name) if not isinstance(value, str) else repr(value)


def _tuning(spec: OpSpec) -> Iterator[str]:
    aliases = "; ".join(f"{alias} reads {dtype}'s" for alias, dtype in spec.dtype_aliases.items())
    keys = ",".join(f"{key}=…" for key in spec.static_keys)
    yield f"- tables: `{keys},device_name=…,{spec.dtype_key}=….json`, {_or(spec.dtypes)}{f' ({aliases})' if aliases else ''}"
    yield f"- a row's size: {spec.size_key}" + ("; name and content are vLLM's" if spec.vllm_compatible else "")
    for twin in ("triton", "pallas"):
        knobs = ", ".join(f"`{knob.name}` ({_legal(knob.legal)})" for knob in spec.knobs_of(twin))
        yield f"- knobs, {twin}: {knobs}"
    shipped = Counter(table.device_name for table in shipped_tables(spec.name))
    devices = ", ".join(f"{name.replace('_', ' ')} ({count})" for name, count in sorted(shipped.items()))
    yield f"- shipped: {devices or 'none; a written rule, with a warning'}"


def _legal(legal: Collection[int] | type[bool]) -> str:
    if isinstance(legal, type):
        return "true, false"
    values = sorted(legal)
    if len(values) > 4 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values))


def _or(words: Collection[str]) -> str:
    return " or ".join(words)


def _names(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(row)} |"
