"""python -m benchmarks run|tune|plot|table. `--help` behind a verb or an op says more."""

import argparse
import os
import sys

# JAX would take three quarters of the GPU's memory when it starts, and torch needs its share.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def parser() -> argparse.ArgumentParser:
    from . import plot, run_command, table, tune_command

    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="run|tune|plot|table")
    for module, text in (
        (run_command, "time both twins, XLA, the peers and the copy ceiling"),
        (tune_command, "measure launch configs and write tuning tables"),
        (plot, "draw the plots and the page from a result file"),
        (table, "print the README's speed table, or write it there"),
    ):
        verb = verbs.add_parser(module.__name__.rpartition(".")[2].removesuffix("_command"), help=text)
        module.add_arguments(verb)
        verb.set_defaults(main=module.main, validate=module.validate)
    return top


def main(argv: list[str] | None = None) -> int:
    top = parser()
    arguments = top.parse_args(argv)
    try:
        arguments.validate(arguments)
    except (ValueError, OSError) as error:
        top.error(str(error))
    return arguments.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
