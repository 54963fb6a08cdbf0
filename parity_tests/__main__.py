"""python -m parity_tests: do the twins agree with the definition and with each other, on this machine?"""

import argparse
import sys
from pathlib import Path

from . import runners


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m parity_tests",
        description="Runs the registry's cases through both packages and compares them with a float64 NumPy definition "
        "and with each other. On a GPU if there is one, else through both interpreters on the CPU. Exit status 1 if any "
        "case fails.",
    )
    parser.add_argument("--cpu", action="store_true", help="use the interpreters even where there is a GPU")
    parser.add_argument(
        "--tags", nargs="+", default=None, metavar="TAG", help="cases to run: ci, standard, odd, large (default: ci on a "
        "CPU, all but large on a GPU)"
    )  # fmt: skip
    parser.add_argument("--match", default="", metavar="TEXT", help="only cases with this text in their name")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page, too")
    parser.add_argument(
        "--candidate", metavar="MODULE:FUNCTION", help="put this function in a twin's place: a torch function in the "
        "Triton twin's (mutates state, returns y), a JAX function in the Pallas twin's (returns y, state)"
    )  # fmt: skip
    parser.add_argument(
        "--framework", choices=("torch", "jax"), help="what the candidate takes, where that is not plain"
    )
    parser.add_argument("--op", nargs="+", metavar="OP", help="only these operators (default: all)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    interpret = runners.prepare(True if options.cpu else None)

    from . import candidate, html, report
    from .cases import CASES, select
    from .operators import OPERATORS

    ops = options.op or list(dict.fromkeys(case.op for case in CASES))
    if unknown_ops := set(ops) - {case.op for case in CASES}:
        parser.error(f"--op: expected some of {sorted({case.op for case in CASES})}, got {sorted(unknown_ops)}")
    tags = options.tags or (["ci"] if interpret else ["ci", "standard", "odd"])
    if unknown := set(tags) - set().union(*(case.tags for case in CASES)):
        parser.error(f"--tags: no case has {', '.join(sorted(unknown))}")
    cases = [case for op in ops for case in select(op=op, tags=tuple(tags)) if options.match in case.name]
    if not cases:
        parser.error(f"--match: no case has {options.match!r} in its name")
    ops = list(dict.fromkeys(case.op for case in cases))

    implementations = {op: runners.twins(op, interpret) for op in ops}
    if options.candidate:
        if len(ops) > 1:
            parser.error(f"--candidate: expected one operator, named with --op, got {', '.join(ops)}")
        sys.path.insert(0, "")  # a candidate lies where the command is run
        try:
            function = candidate.load(options.candidate)
            framework = options.framework or candidate.framework(function)
        except ValueError as error:
            parser.error(str(error))
        ours = implementations[ops[0]]
        if framework == "torch":
            ours["triton"] = runners.torch_runner(OPERATORS[ops[0]], function, interpret)
        else:
            ours["mosaic_gpu"] = runners.jax_runner(OPERATORS[ops[0]], function, interpret)
            del ours["xla"]

    device = runners.device(interpret)
    ran_on = (
        f"the CPU, through the Triton interpreter and the Mosaic GPU interpreter (tables of {device.name})"
        if interpret
        else device.name
    )
    versions = report.versions()
    print(f"twin-ssm parity: {', '.join(ops)}: {len(cases)} cases, on {ran_on}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    if options.candidate:
        place = "triton" if framework == "torch" else "mosaic_gpu"
        print(f"candidate {options.candidate} ({framework}) stands in the place of {place!r}")

    reports = report.run(cases, implementations, device, lambda one: print("\n".join(report.lines(one)), flush=True))
    failed = sum(not one.ok for one in reports)
    print(
        f"{len(reports) - failed} of {len(reports)} cases agree, on {ran_on}" + (f"; {failed} FAIL" if failed else "")
    )
    if options.html:
        html.write(options.html, reports, ran_on, versions)
        print(f"wrote {options.html}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
