"""`run stages` and `tune stages`: the stages of the chunked operators, one after the other in one process."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .ops import STAGES

NAME = "stages"


def add_parser(ops: Any, verb: str, about: str | None) -> argparse.ArgumentParser:
    """`ops`: the subparsers of operators, beside which this one stands."""
    command = ops.add_parser(
        NAME, help=f"{verb} the stages of the chunked operators", description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument("ops", nargs="*", metavar="op", help=f"only these, of {', '.join(STAGES)}")
    return command


def validate(arguments: argparse.Namespace) -> None:
    for name in arguments.ops:
        if name not in STAGES:
            raise ValueError(f"op: expected some of {', '.join(STAGES)}, got {name}")


def each(names: Sequence[str], run: Callable[[str], int]) -> int:
    """The worst exit status. What goes wrong with one costs the others nothing, unless the GPU goes with it."""
    failed = 0
    for name in names or list(STAGES):
        try:
            failed = max(failed, run(name))
        except torch.AcceleratorError:
            raise  # the context is lost, and with it every later measurement
        except Exception as error:
            failed = 1
            print(f"FAILED {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return failed
