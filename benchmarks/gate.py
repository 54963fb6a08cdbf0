"""The numeric gate: y and every state against the definition in float64, on the device."""

from collections.abc import Mapping

import torch

from parity_tests.cases import Case
from parity_tests.compare import Error
from parity_tests.operators import OPERATORS
from parity_tests.tolerances import tolerance

from .op import BenchOp, Tensors


def errors(op: BenchOp, case: Case, initial: Tensors, results: Mapping[str, torch.Tensor]) -> dict[str, Error]:
    """Per result ‖got - ref‖ / ‖ref‖ and max |got - ref| / max |ref|, in pieces that fit beside a pool of any size.

    `results` may leave out what the reference has: a peer's state need not lie where ours does.
    """
    zero = torch.zeros((), dtype=torch.float64, device=next(iter(initial.values())).device)
    sums = {name: [zero, zero, zero, zero] for name in results}  # Σ err², Σ ref², max err, max ref
    seen = dict.fromkeys(results, 0)
    for name, index, expected in op.pieces(case, initial):
        if name not in results:
            continue
        if expected is None or not expected.numel():
            seen[name] += 0 if expected is not None else results[name][index].numel()
            continue
        difference = (results[name][index].double() - expected).abs_()
        expected = expected.abs()
        # torch.maximum and sums carry a NaN to the end
        error2, reference2, error, reference = sums[name]
        sums[name] = [
            error2 + difference.square().sum(),
            reference2 + expected.square().sum(),
            torch.maximum(error, difference.max()),
            torch.maximum(reference, expected.max()),
        ]
        seen[name] += expected.numel()
    for name, result in results.items():
        if seen[name] != result.numel():
            raise ValueError(f"{op.name}: the reference covers {seen[name]} of {result.numel()} elements of {name}")
    return {
        name: Error(float((error2 / reference2).sqrt()), float(error / reference))
        for name, (error2, reference2, error, reference) in sums.items()
    }


def verdict(op: BenchOp, case: Case, found: Mapping[str, Error], slack: float = 1.0) -> str | None:
    """What is wrong, or None. A NaN is never within a tolerance. `slack` widens all of them."""
    for name, error in found.items():
        if name in op.exact:
            if not error.within(0.0, 0.0):
                return f"{name}: expected a copy bit for bit, got relative error {error.relative:.3g}"
            continue
        # What an operator calls its state is no matter to the tolerances: whatever is not y is one.
        operator = OPERATORS[op.operator]
        output = name if name in operator.outputs else "state"
        limit = max(tolerance(operator.name, dtype) for dtype in operator.rounded_to(case, output))
        relative, worst = slack * limit.relative, slack * limit.worst
        if not error.within(relative, worst):
            return (
                f"{name}: relative error {error.relative:.3g} (tolerance {relative:g}), "
                f"worst {error.worst:.3g} (tolerance {worst:g})"
            )
    return None
