"""What the two convolution ops have in common: draws, the definition in float64, and other libraries' layouts."""

import itertools
from collections.abc import Collection, Mapping
from types import SimpleNamespace

import torch

from parity_tests.cases import Case
from ssm_configs.spec import Knobs

# float64 elements that the reference holds at a time; it needs a handful of such tensors.
CHUNK = 1 << 26
# The Mamba-2 8B models', Mamba2-2.7B's and Qwen3-Next's.
CHANNELS = (10240, 5376, 8192)
# What vLLM's kernel computes at a time, which its callers' tables must match; likewise FLA's.
_VLLM_BLOCK, FLA_BLOCK = 8, 64


def rows_and_channels(size: int) -> tuple[int, int]:
    """The shape behind a table key: rows (tokens or sequences), and the first of `CHANNELS` that divides the size."""
    for D in CHANNELS:
        if size % D == 0:
            return size // D, D
    raise ValueError(f"size: expected a multiple of {', '.join(map(str, CHANNELS))} channels, got {size}")


def x_dtype(table_dtype: str) -> str:
    """The dtype that a table is tuned with; models run in bfloat16, which reads the float16 table."""
    return "bfloat16" if table_dtype == "float16" else table_dtype


def check_options(case: Case, known: Collection[str]) -> None:
    """ValueError where the case asks for what the declaration does not draw."""
    if unknown := [name for name, value in case.options.items() if value and name not in known]:
        raise ValueError(f"{case}: {', '.join(unknown)} cannot be benchmarked")
    if not case.options["bias"] or case.options["activation"] != "silu":
        raise ValueError(f"{case}: expected a bias and SiLU, as the models have them")


def normal(tensor: torch.Tensor, generator: torch.Generator) -> None:
    for part in tensor.view(-1).split(1 << 28):
        part.normal_(generator=generator)


def weight(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """As torch's Conv1d initialises it, for a width of 4."""
    tensor.uniform_(-0.5, 0.5, generator=generator)


def slots(tensor: torch.Tensor, generator: torch.Generator, S: int) -> None:
    tensor.copy_(torch.randperm(S, generator=generator, device=tensor.device)[: len(tensor)])


def convolve(window: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """SiLU(bias + Σ_j weight[:, j] · window[j : …]) over the first axis, in float64."""
    taps, window = tensors["weight"].double(), window.double()
    rows = len(window) - taps.shape[1] + 1
    y = tensors["bias"].double().expand(rows, *window.shape[1:]).clone()
    for j in range(taps.shape[1]):
        y.addcmul_(window[j : j + rows], taps[:, j])
    return y.mul_(torch.sigmoid(y))


def flops(outputs: int, W: int) -> int:
    """A multiply-add a tap, and SiLU's exp, sum, division and product."""
    return outputs * (2 * W + 4)


def vector_launches(dtype: str, widest: int) -> list[Knobs]:
    """BLOCK_SIZE_D and num_warps for which a thread's channels are one load of 4 to 16 bytes."""
    per_load = [nbytes // getattr(torch, dtype).itemsize for nbytes in (4, 8, 16)]
    launches = {(32 * warps * channels, warps) for warps in (1, 2, 4, 8) for channels in per_load}
    return [{"BLOCK_SIZE_D": D, "num_warps": warps} for D, warps in sorted(launches) if D <= widest]


def blocks(bounds: list[int], block: int) -> list[tuple[int, int]]:
    """(sequence, block within it) for every block of packed sequences."""
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    return [(n, i) for n, length in enumerate(lengths) for i in range(-(-length // block))]


def vllm_metadata(bounds: list[int], device: torch.device) -> SimpleNamespace:
    """What vLLM's scheduler hands to every layer of a step, so that no layer waits for the lengths."""
    table = torch.tensor(blocks(bounds, _VLLM_BLOCK), dtype=torch.int32).reshape(-1, 2).T.contiguous()
    sequence, chunk = table.to(device)
    block = {"tot": table.shape[1], "mlist": table[0], "mlist_len": table.shape[1], "offsetlist": table[1]}
    block |= {"batch_ptr": sequence, "token_chunk_offset_ptr": chunk}
    return SimpleNamespace(nums_dict={_VLLM_BLOCK: block}, batch_ptr=sequence, token_chunk_offset_ptr=chunk)


def fla_state(state: torch.Tensor) -> torch.Tensor:
    """[N,W-1,D] in FLA's layout, [N,D,W] with a first column that is not used."""
    return torch.nn.functional.pad(state.transpose(1, 2), (1, 0)).contiguous()
