"""What an operator declares to be benchmarked and tuned. Runner, tuner and plots know operators only through this."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from parity_tests.cases import Case
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
    """Some rows (along the first axis) of one result, and what they must be, in float64."""

    result: str
    rows: slice | torch.Tensor
    expected: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class BenchOp:
    """`spec.name` is the function's name in both packages."""

    spec: OpSpec
    positional: tuple[str, ...]
    """The arguments passed by position; every other operand is passed by name."""
    scalars: Mapping[str, object]
    """Keyword arguments that are no tensors."""
    output: str
    """The operand whose shape and dtype the output `y` has."""
    mutated: tuple[str, ...]
    """Operands that the op updates: in place in torch, returned after y (and donated) in JAX."""

    sizes: tuple[int, ...]
    """The size keys of a tuned table."""
    first_sizes: tuple[int, ...]
    """Where every candidate is timed when each size is a compile of its own; the rest see the best of these."""
    grid: Mapping[str, tuple[int, ...]]
    """Static keys the tuner goes through by default."""
    run_sizes: tuple[int, ...]
    run_statics: Mapping[str, int]
    run_dtypes: tuple[str, ...]
    """The sweep that `run` measures and plots, one line a dtype."""
    quoted_as: str
    """The op's name in files of peers' figures."""

    case: Callable[[int, Mapping[str, int], str], Case]
    """(size, statics, table dtype) -> the shape behind a table key."""
    table_key: Callable[[Case], tuple[int, dict[str, int]]]
    """The inverse, for any case: (size, statics)."""
    single: Callable[[Case], Case]
    """The smallest case that compiles the same Triton kernel: what warms it up."""
    operands: Callable[[Case], dict[str, Operand]]
    pieces: Callable[[Case, Tensors], Iterator[Piece]]
    """The definition in float64 on the device, piece by piece: every element of y and of all mutated operands, once."""
    bytes_moved: Callable[[Case], int]
    """Least traffic: each input read once, each output written once."""
    flops: Callable[[Case], int]
    candidates: Callable[[str, Mapping[str, int], str], list[Knobs]]
    """(twin, statics, table dtype) -> the configs worth measuring."""
    peers: tuple[Peer, ...]

    @property
    def name(self) -> str:
        return self.spec.name

    def dtype_of(self, case: Case) -> str:
        """The dtype that keys the op's tables."""
        return self.spec.table_dtype(case.state_dtype)


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
    return tensors
