"""`python -m benchmarks table`: the README's speed table, from the committed results and nothing else."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import results
from .results import Row

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- speed -->\n", "<!-- /speed -->"
COLUMNS = {
    "triton": "`triton_ssm`",
    "mosaic_gpu": "`pallas_ssm`",
    "xla": "XLA",
    "peer:vllm": "vLLM",
    "peer:mamba_ssm": "mamba_ssm",
    "peer:fla": "FLA",
    "peer:bonsai": "Bonsai",
    "peer:maxtext": "MaxText",
    "peer:flash_qla": "FlashQLA",
    "peer:flashinfer": "FlashInfer",
}


class Line(NamedTuple):
    """One line of the table: how it is called, and the row's case and dims that it shows."""

    title: str
    case: str
    dims: dict[str, Any]


LINES = {
    "selective_state_update": tuple(
        Line(
            f"decode step, {size // 128} × 128 heads, {dtype} state",
            f"E={size}",
            {"state_dtype": dtype},
        )
        for dtype in ("float32", "bfloat16")
        for size in (1024, 8192, 65536)
    ),
    "mamba_chunk_scan_combined": (
        Line("scan, 8192 tokens × 128 heads", "Nemotron-H-8B (H=128, G=8): T=8192", {}),
        Line(
            "the same, four packed and resumed sequences",
            "Nemotron-H-8B, four packed and resumed sequences: T=8192",
            {},
        ),
        Line("scan, 1024 tokens × 128 heads", "Nemotron-H-8B (H=128, G=8): T=1024", {}),
        Line("scan, 8192 tokens × 80 heads", "Mamba2-2.7B (H=80, G=1): T=8192", {}),
        Line("scan, 8192 tokens × 16 heads", "Nemotron-H-8B/TP8 (H=16, G=1): T=8192", {}),
    ),
    "chunk_gated_delta_rule": (
        Line("delta rule, 8192 tokens × 32 heads", "Qwen3-Next (H_k=16, H_v=32): T=8192", {}),
        Line("delta rule, 32768 tokens × 32 heads", "Qwen3-Next (H_k=16, H_v=32): T=32768", {}),
        Line("delta rule, 4 × 8192 tokens × 32 heads", "Qwen3-Next, four sequences of: T=8192", {}),
        Line(
            "delta rule, four packed and resumed sequences",
            "Qwen3-Next, four packed and resumed sequences: T=8192",
            {},
        ),
        Line("delta rule, 8192 tokens × 8 heads", "Qwen3.5-397B/TP8 (H_k=2, H_v=8): T=8192", {}),
        Line("delta rule, 32768 tokens × 8 heads", "Qwen3.5-397B/TP8 (H_k=2, H_v=8): T=32768", {}),
    ),
    "gdn_chunk_o": (Line("its outputs alone, 8192 tokens × 32 heads", "Qwen3-Next (H_k=16, H_v=32): T=8192", {}),),
    "fused_recurrent_gated_delta_rule": tuple(
        Line(
            f"delta rule's decode step, {batch} × 32 heads, {dtype} state",
            f"Qwen3-Next (H_k=16, H_v=32): B={batch}",
            {"state_dtype": dtype},
        )
        for dtype in ("float32", "bfloat16")
        for batch in (32, 128, 256)
    ),
    "causal_conv1d": (
        Line("convolution, 8192 tokens × 10240 channels", "one sequence, D=10240: T=8192", {}),
        Line("the same, four packed sequences", "four packed sequences, D=10240: T=8192", {}),
        Line("convolution, 8192 tokens × 5376 channels", "one sequence, T=8192: D=5376", {}),
    ),
    "causal_conv1d_update": tuple(
        Line(f"convolution step, {batch} × 10240 channels", f"D=10240: B={batch}", {}) for batch in (64, 256, 1024)
    ),
}

_DELTA_RULE = """\
Delta rule: K = V = 128, half as many key heads as value heads (8 value heads: 2), normalised keys, fp32 gates, final states;
its decode step computes norms and gates itself.
"""


def table(device: str = "NVIDIA_H200") -> str:
    """Markdown: µs of device time, cold L2, median; what an implementation was not measured for stays empty."""
    header = ["", *COLUMNS.values(), "copy of the same bytes"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    used: set[str] = set()
    versions: dict[str, str] = {}
    for op, wanted in LINES.items():
        path = RESULTS / device / f"{op}.json"
        if not path.exists():
            continue
        head, measured = results.read(path)
        versions |= head["versions"]
        for line in wanted:
            rows = {row.implementation: row for row in _matching(measured, line)}
            if not rows:  # not measured on this device
                continue
            used |= rows.keys()
            cells = [_cell(rows.get(name)) for name in COLUMNS]
            lines.append([line.title, *cells, f"{next(iter(rows.values())).floor_us:.1f}"])
    keep = [i for i, name in enumerate(COLUMNS, 1) if name in used]
    keep = [0, *keep, len(header) - 1]
    rendered = "\n".join("| " + " | ".join(line[i] for i in keep) + " |" for line in lines)
    software = ", ".join(
        f"{name} {versions[name]}"
        for name in ("torch", "triton", "jax", "vllm", "mamba_ssm", "flash_qla", "flashinfer")
        if name in versions
    )
    delta = _DELTA_RULE if any((RESULTS / device / f"{op}.json").exists() for op in LINES if "delta_rule" in op) else ""
    return (
        f"## Speed\n\nMicroseconds on one {device.replace('_', ' ')} (driver {versions['driver']}; {software}): device time, "
        "cold L2, median, random data,\nan operator's rows by one run or by the few that its result file names. "
        "Decode: headdim 64, dstate 128, 8 groups. Scan: the "
        "same sizes, from raw dt, with D and final states.\nConvolution: width 4, bias, SiLU, a pool of states. Activations "
        "are bf16. The copy moves the operator's minimum bytes at the\nmeasured copy bandwidth. FLA runs its packed form, "
        "with the config that its own autotuner chose for the first shape it met.\n"
        f"{delta}All rows and plots are in `benchmarks/results/{device}`.\n\n{rendered}\n"
    )


def _matching(rows: Iterable[Row], line: Line) -> Iterator[Row]:
    for row in rows:
        if row.case == line.case and all(row.dims.get(key) == value for key, value in line.dims.items()):
            yield row


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{row.us:.1f}"


def in_readme(text: str, new: str) -> str:
    """The README's text with the table put between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README: expected {BEGIN.strip()} and {END}")
    return before + BEGIN + new + END + after


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help="put it into the README")


def validate(arguments: argparse.Namespace) -> None:
    """Nothing that argparse cannot see."""


def main(arguments: argparse.Namespace) -> int:
    print(table())
    if arguments.write:
        README.write_text(in_readme(README.read_text("utf-8"), table()), "utf-8")
    return 0
