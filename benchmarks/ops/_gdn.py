"""What the gated delta rule's ops have in common: draws as models initialise, sequences, and other libraries' forms."""

import importlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from parity_tests.cases import Case
from parity_tests.cases_gdn import QWEN3_NEXT, QWEN_397B, GDNDims

from ..op import Operand, Tensors
from ..peers import Peer

# The models that sweeps are about: 32 value heads, and what a rank of eight has of 64.
WIDE, NARROW = QWEN3_NEXT, QWEN_397B.slice(8)
# In sixteenths of all tokens: sequences that end in the midst of any chunk.
_FOUR = (1, 7, 3, 5)
# What vLLM calls its copy of FLA, newest first.
_VLLM = ("vllm.third_party.flash_linear_attention.ops", "vllm.model_executor.layers.fla.ops")


@dataclass(frozen=True)
class VllmPeer(Peer):
    """`module`: below the package in which vLLM keeps FLA, whose name changed."""

    def load(self) -> Callable[..., Any]:
        missing = None
        for package in _VLLM:
            try:
                return getattr(importlib.import_module(f"{package}.{self.module}"), self.function)
            except (ImportError, AttributeError) as error:
                missing = missing or error
        raise ImportError(f"vllm has no {self.function}: {missing}")

    def version(self) -> str:
        return getattr(importlib.import_module("vllm"), "__version__", "unknown")


def packed(T: int) -> tuple[int, ...]:
    """Four sequences of T tokens in all."""
    lengths = [T * part // 16 - 5 for part in _FOUR]
    lengths[-1] += T - sum(lengths)
    return tuple(lengths)


def dims(model: GDNDims, T: int, B: int = 1, L: int = 64) -> dict[str, int]:
    return {"B": B, "T": T, "H_k": model.H_k, "H_v": model.H_v, "K": model.K, "V": model.V, "L": L}


def bounds(case: Case) -> list[tuple[int, int, int]]:
    """(batch row, begin, end) of every sequence."""
    ends = list(itertools.accumulate(case.options.get("lengths", ()), initial=0))
    return [(0, *pair) for pair in itertools.pairwise(ends)] or [(b, 0, case.dims["T"]) for b in range(case.dims["B"])]


def sequences(case: Case) -> int:
    return len(case.options.get("lengths", range(case.dims["B"])))


def normal(tensor: torch.Tensor, generator: torch.Generator) -> None:
    for part in tensor.view(-1).split(1 << 28):
        part.normal_(generator=generator)


def unit(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Keys and queries as a model's l2norm leaves them."""
    normal(tensor, generator)
    for part in tensor.view(-1, tensor.shape[-1]).split(1 << 20):
        part /= part.norm(dim=-1, keepdim=True)


def strength(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """beta."""
    tensor.normal_(generator=generator).sigmoid_()


def step_bias(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """dt_bias of gated delta nets: its softplus is log-uniform in [1e-3, 1e-1], as in Mamba-2."""
    step = tensor.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
    tensor.copy_(step + torch.log(-torch.expm1(-step)))


def log_rate(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """A_log, the logarithm of what is uniform between 1 and 16."""
    tensor.uniform_(1, 16, generator=generator).log_()


def decay(tensor: torch.Tensor, generator: torch.Generator, slow: bool = False) -> None:
    """g = -exp(A_log)·softplus(a + dt_bias), a normal; per head the last axis. `slow`: a state outlives thousands of tokens."""
    rate, bias = (tensor.new_empty(tensor.shape[-1]) for _ in range(2))
    log_rate(rate, generator)
    step_bias(bias, generator)
    tensor.normal_(generator=generator).add_(bias)
    tensor.copy_(torch.nn.functional.softplus(tensor).mul_(-rate.exp_().mul_(1e-2 if slow else 1.0)))


def within_chunks(g: torch.Tensor, case: Case) -> torch.Tensor:
    """g [B,T,H_v] summed up within each chunk, in fp32."""
    sums = g.double().cumsum(1)
    before = torch.zeros_like(sums)
    for b, begin, end in bounds(case):
        for start in range(begin, end, case.dims["L"]):
            if start:
                before[b, start : min(start + case.dims["L"], end)] = sums[b, start - 1]
    return (sums - before).float()


def tokens(case: Case) -> dict[str, Operand]:
    """q, k and v, and cu_seqlens if there is more than one sequence to a batch row."""
    B, T, H_k, H_v, K, V = (case.dims[key] for key in ("B", "T", "H_k", "H_v", "K", "V"))
    lengths = case.options.get("lengths", ())
    keys = normal if case.options.get("l2norm") else unit

    def ends(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.copy_(torch.tensor([0, *lengths]).cumsum(0))

    drawn = {
        "q": Operand((B, T, H_k, K), case.dtype, keys),
        "k": Operand((B, T, H_k, K), case.dtype, keys),
        "v": Operand((B, T, H_v, V), case.dtype, normal),
    }
    return drawn | ({"cu_seqlens": Operand((len(lengths) + 1,), "int32", ends)} if lengths else {})


def check_options(case: Case, known: tuple[str, ...]) -> None:
    """ValueError where the case asks for what the declaration does not draw."""
    if unknown := [name for name, value in case.options.items() if value and name not in known]:
        raise ValueError(f"{case}: {', '.join(unknown)} cannot be benchmarked")


def chunk_indices(tensors: Tensors, chunk_size: int) -> dict[str, torch.Tensor]:
    """What FLA and vLLM prepare once a step of packed sequences: each chunk's sequence and its place there; and bounds."""
    if "cu_seqlens" not in tensors:
        return {}
    ends = tensors["cu_seqlens"]
    pairs = [(n, chunk) for n, length in enumerate(ends.diff().tolist()) for chunk in range(-(-length // chunk_size))]
    indices = torch.tensor(pairs, dtype=torch.int64, device=ends.device)
    return {"cu_seqlens": ends.long(), "chunk_indices": indices}


def swapped(state: torch.Tensor | None) -> torch.Tensor | None:
    """[…,K,V] as a dense [...,V,K]."""
    return None if state is None else state.transpose(-1, -2).contiguous()
