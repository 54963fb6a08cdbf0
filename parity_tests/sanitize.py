"""A handful of odd cases in one process, for compute-sanitizer to watch: python -m parity_tests.sanitize"""

import sys

from . import runners

NAMES = (
    "P=80 N=96", "destination slots, padding and null slot", "packed, padding and destination slots",
    "speculative, 16-bit states, padding", "stochastic rounding to fp16, N=96",
)  # fmt: skip


def main() -> int:
    runners.prepare(interpret=False)
    from . import report
    from .cases import select

    op = "selective_state_update"
    # XLA's own kernels are not ours to watch.
    twins = {name: run for name, run in runners.twins(op, interpret=False).items() if name != "xla"}
    cases = [case for case in select(op=op, tags=("odd",)) if case.name in NAMES]
    reports = report.run(cases, twins, runners.device(interpret=False), lambda one: print(*report.lines(one), sep="\n"))
    return 0 if len(reports) == len(NAMES) and all(one.ok for one in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
