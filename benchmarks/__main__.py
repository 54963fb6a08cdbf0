"""python -m benchmarks VERB. `--help` behind a verb or an op says more."""

import argparse
import os
import signal
import sys

# JAX would take three quarters of the GPU's memory when it starts, and torch needs its share.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def parser() -> argparse.ArgumentParser:
    from . import docs, host_command, plot, report, run_command, start_command, table, transfer, tune_command

    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = (
        (run_command, "time both twins, XLA, the peers and the copy ceiling"),
        (tune_command, "measure launch configs and write tuning tables"),
        (plot, "draw the plots from a result file"),
        (table, "print the README's speed table, or write it there"),
        (report, "one page of all results of a device"),
        (transfer, "time rows that were tuned elsewhere"),
        (start_command, "time the first call, with empty caches and with full ones"),
        (host_command, "time what a call costs the host"),
        (docs, "write the pages of docs/ that follow from the code"),
    )
    names = [module.__name__.rpartition(".")[2].removesuffix("_command") for module, _ in commands]
    verbs = top.add_subparsers(dest="verb", required=True, metavar="|".join(names))
    for name, (module, text) in zip(names, commands, strict=True):
        verb = verbs.add_parser(name, help=text)
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
    # What was measured before a time limit is worth having: let every `finally` run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
