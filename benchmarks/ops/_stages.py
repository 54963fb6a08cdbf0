"""How the stages of the chunked operators are declared: where chunks stand, and what follows from the registry."""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from parity_tests.cases import Case
from parity_tests.operators import OPERATORS
from parity_tests.oracle.chunks import Chunk, chunks
from ssm_configs import SPECS, Device
from ssm_configs.spec import Knobs

from ..op import BenchOp, Operand, Piece


def stage(name: str, *, single_tokens: Callable[[Case], int], **declared: Any) -> BenchOp:
    """`name`: the stage's path below the packages. `single_tokens`: of the smallest case with the same compiled kernel."""
    operator = OPERATORS[name]

    def single(case: Case) -> Case:
        if lengths := case.options.get("lengths"):
            options = {**case.options, "lengths": (8,) * len(lengths)}
            return replace(case.with_dims(T=8 * len(lengths)), name="single", options=options)
        return replace(case.with_dims(B=1, T=single_tokens(case)), name="single")

    return BenchOp(
        spec=SPECS[operator.table],
        mutated=(),
        fresh=operator.outputs[1:],
        drawn=False,
        dtype_field="dtype",
        table_key=operator.sizes,
        single=single,
        **{"output": None, "tuned_dtypes": ("float16",), "run_dtypes": ("bfloat16",), **declared},
    )


def places(case: Case) -> tuple[int, list[Chunk]]:
    """(NC, the chunks) of a case."""
    lengths = case.options.get("lengths")
    ends = None if lengths is None else list(itertools.accumulate(lengths, initial=0))
    return chunks(case.dims["B"], case.dims["T"], case.dims["L"], ends)


def of_chunk(tensor: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """[heads,l,…] in float64 of a tensor [B,T,heads,…]."""
    return tensor[chunk.b, chunk.begin : chunk.end].double().transpose(0, 1)


def unused(case: Case) -> list[tuple[int, int]]:
    """(batch row, slot) in which no chunk stands."""
    NC, found = places(case)
    used = {(chunk.b, chunk.slot) for chunk in found}
    return [place for place in itertools.product(range(case.dims["B"]), range(NC)) if place not in used]


def without_meaning(case: Case, results: Collection[str], heads_first: bool = False) -> Iterator[Piece]:
    """What stands in such slots of results [B,NC,…] (`heads_first`: [B,H,NC,…]) may be anything."""
    for b, slot in unused(case):
        for result in results:
            yield Piece(result, (b, slice(None), slot) if heads_first else (b, slot), None)


def by_sequence(case: Case) -> list[list[Chunk]]:
    """Every sequence's chunks in order; none of one without tokens."""
    found: list[list[Chunk]] = [[] for _ in range(sequences(case))]
    for chunk in places(case)[1]:
        found[chunk.sequence].append(chunk)
    return found


def sequences(case: Case) -> int:
    return len(case.options.get("lengths", range(case.dims["B"])))


def bounds(case: Case) -> dict[str, Operand]:
    """cu_seqlens, if the case has lengths."""
    lengths = case.options.get("lengths", ())

    def ends(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.copy_(torch.tensor([0, *lengths]).cumsum(0))

    return {"cu_seqlens": Operand((len(lengths) + 1,), "int32", ends)} if lengths else {}


def is_dense(case: Case) -> bool:
    """Peers are called on these alone: they number chunks in ways of their own."""
    return "lengths" not in case.options


def is_one_sequence(case: Case) -> bool:
    return is_dense(case) and case.dims["B"] == 1


def width(case: Case) -> int:
    """Bytes of an activation."""
    return getattr(torch, case.dtype).itemsize


def tuned_dtype(table_dtype: str) -> str:
    """The dtype that a table is tuned with; models run in bfloat16, which reads the float16 table."""
    return "bfloat16" if table_dtype == "float16" else table_dtype


def product(**choices: Collection[int] | Collection[bool]) -> list[Knobs]:
    """Every combination, the last knob running fastest."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def rule_first(spec_name: str, statics: Mapping[str, int], dtype: str, candidates: list[Knobs]) -> list[Knobs]:
    """The written rule for an H200 before all others: a tuner that is stopped has measured it, and does no worse."""
    rule = SPECS[spec_name].heuristic(statics, dtype, Device("NVIDIA H200", (9, 0)), 1)
    return [rule, *(knobs for knobs in candidates if knobs != rule)]
