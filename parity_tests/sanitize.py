"""A handful of odd cases in one process, for compute-sanitizer to watch: python -m parity_tests.sanitize"""

import sys

from . import runners

NAMES = {
    "selective_state_update": (
        "P=80 N=96", "P=48 N=16", "destination slots, padding and null slot", "packed, padding and destination slots",
        "speculative, 16-bit states, padding", "stochastic rounding to bf16", "stochastic rounding to fp16, N=96",
    ),
    "causal_conv1d": ("width 6, packed", "pool, padding and null slot", "split, chunk-aligned, pool"),
    "causal_conv1d_update": ("padding and null slot", "speculative, padding, short pool", "width 5"),
    "mamba_chunk_scan_combined": ("dense", "packed, everything", "packed, aligned, slow decay", "fp32, packed, everything"),
    "gdn.chunk_o": ("packed", "gates in powers of two, states [V,K]"),
    "gdn.recompute_w_u": ("packed", "no gate, chunks of 32"),
    "chunk_gated_delta_rule": ("packed, everything", "fp32, packed, everything", "K=60 V=100"),
    "fused_recurrent_gated_delta_rule": (
        "K=60 V=100, bf16 state", "packed, padding and destination slots", "speculative, 16-bit states, padding",
    ),
}  # fmt: skip


def main() -> int:
    runners.prepare(interpret=False)
    from . import report
    from .cases import select

    # XLA's own kernels are not ours to watch.
    twins = {op: {k: run for k, run in runners.twins(op, interpret=False).items() if k != "xla"} for op in NAMES}
    cases = [case for op, names in NAMES.items() for case in select(op=op, tags=("odd",)) if case.name in names]
    reports = report.run(cases, twins, runners.device(interpret=False), lambda one: print(*report.lines(one), sep="\n"))
    assert len(reports) == sum(len(names) for names in NAMES.values())
    return 0 if all(one.ok for one in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
