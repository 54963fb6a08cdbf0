"""What an operator declares to be benchmarked and tuned. Runner, tuner and plots know operators only through this."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from parity_tests.cases import Case
from parity_tests.operators import OPERATORS
from ssm_configs.spec import Knobs, OpSpec

from .peers import Peer

Tensors = Mapping[str, torch.Tensor]
Fill = Callable[[torch.Tensor, torch.Generator], None]


class Operand(NamedTuple):
    """A tensor argument: its shape, dtype name, and how to draw it in place."""

    shape: tuple[int, ...]
    dtype: str
    fill: Fill


class Piece(NamedTuple):
    """Some part of one result, as an index into it, and what it must be, in float64; None where it has no meaning."""

    result: str
    index: int | slice | torch.Tensor | tuple[int | slice, ...]
    expected: torch.Tensor | None


class Sweep(NamedTuple):
    """A line of cases over one size."""

    sizes: tuple[int, ...]
    case: Callable[[int, str], Case]
    """(size, dtype) -> a case with the name that `point_name` gives."""


def point_name(axis: str, size: int, line: str = "") -> str:
    """The name of a sweep's case, by which plots know it: its place on the axis, after what the line has in common."""
    return f"{line}: {axis}={size}" if line else f"{axis}={size}"


def _as_drawn(case: Case, tensors: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    """Operands that have nothing to do with each other."""


@dataclass(frozen=True, kw_only=True)
class BenchOp:
    """`spec.name` is the function's name in both packages; a stage's is gdn_chunk_o for gdn.chunk_o."""

    spec: OpSpec
    positional: tuple[str, ...]
    """The arguments passed by position; every other operand is passed by name."""
    scalars: Callable[[Case], Mapping[str, object]]
    """A case's keyword arguments that are no tensors."""
    output: str | None
    """The operand whose shape and dtype the first result has, for the buffer that torch gets; None where it takes none."""
    mutated: tuple[str, ...]
    """Operands that the op updates, where a case has them: in place in torch, returned after the first result (and donated)
    in JAX."""
    fresh: tuple[str, ...] = ()
    """What it returns after the first result in both packages where a case has none of `mutated`."""
    own: tuple[str, ...] = ("triton", "mosaic_gpu", "xla")
    """The implementations of this repository that there are."""
    untuned: Mapping[str, str] = field(default_factory=dict)
    """Twins whose launches read no table, and why."""
    exact: tuple[str, ...] = ()
    """Results that are copies of inputs, and must be so bit for bit."""

    sizes: tuple[int, ...]
    """The size keys of a tuned table."""
    first_sizes: tuple[int, ...]
    """Where every candidate is timed when each size is a compile of its own; the rest see the best of these."""
    grid: Mapping[str, tuple[int, ...]]
    """Static keys the tuner goes through by default."""
    tuned_dtypes: tuple[str, ...] | None = None
    """Likewise table dtypes; None for all of them."""
    sweeps: Mapping[str, Sweep]
    drawn: bool = True
    """Whether sweeps are curves, one figure each and dtype; else a few shapes for a table."""
    run_dtypes: tuple[str, ...]
    """What `run` measures."""
    dtype_field: Literal["dtype", "state_dtype"]
    """Which dtypes of a case stand in results."""
    quoted_as: str | None = None
    """The op's name in files of peers' figures."""
    quoted_statics: Mapping[str, int] = field(default_factory=dict)
    """What those figures were taken at and do not say."""

    case: Callable[[int, Mapping[str, int], str], Case]
    """(size, statics, table dtype) -> the shape behind a table key."""
    table_key: Callable[[Case], tuple[int, dict[str, int]]]
    """The inverse, for any case: (size, statics)."""
    single: Callable[[Case], Case]
    """The smallest case that compiles the same Triton kernel: what warms it up."""
    operands: Callable[[Case], dict[str, Operand]]
    finish: Callable[[Case, dict[str, torch.Tensor], torch.Generator], None] = _as_drawn
    """Makes drawn operands into what follows from others of them, in place."""
    pieces: Callable[[Case, Tensors], Iterator[Piece]]
    """The definition in float64 on the device, piece by piece: every element of every result, once."""
    bytes_moved: Callable[[Case], int]
    """Least traffic: each input read once, each output written once."""
    flops: Callable[[Case], int]
    candidates: Callable[[str, Mapping[str, int], str], list[Knobs]]
    """(twin, statics, table dtype) -> the configs worth measuring."""
    peers: tuple[Peer, ...]

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def operator(self) -> str:
        """Its name in the registry of operators, which is its path below the packages."""
        return next(name for name, operator in OPERATORS.items() if operator.table == self.name)

    def function(self, package: Any) -> Callable[..., Any]:
        return OPERATORS[self.operator].function(package, {})

    @property
    def result(self) -> str:
        """The name of what it returns first."""
        return OPERATORS[self.operator].outputs[0]

    def dtype_of(self, case: Case) -> str:
        """The one that tables and figures go by."""
        return OPERATORS[self.operator].table_dtype(case)

    def mutated_in(self, operands: Collection[str]) -> tuple[str, ...]:
        """Of a case with these operands, those that a call updates."""
        return tuple(name for name in self.mutated if name in operands)

    def after_y(self, operands: Collection[str]) -> tuple[str, ...]:
        """What a call on these operands has for results besides the first."""
        return self.mutated_in(operands) or self.fresh


class Storage:
    """Device buffers by name, kept and sliced from one shape to the next: a state pool may be half of the memory."""

    def __init__(self, device: torch.device):
        self.device = device
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Memory of this shape; whatever was taken under the same name before is gone."""
        torch_dtype = getattr(torch, dtype)
        numel = 1
        for size in shape:
            numel *= size
        nbytes = numel * torch_dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < nbytes:
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return buffer[:nbytes].view(torch_dtype).view(shape)


def draw(op: BenchOp, case: Case, storage: Storage, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random operands on the storage's device, the same for the same case and seed."""
    generator = torch.Generator(storage.device).manual_seed(seed)
    tensors = {}
    for name, operand in op.operands(case).items():
        tensors[name] = storage.take(name, operand.shape, operand.dtype)
        operand.fill(tensors[name], generator)
    op.finish(case, tensors, generator)
    return tensors
