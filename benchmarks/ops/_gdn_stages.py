"""What the gated delta rule's stages have in common: their definitions of one chunk in float64, draws, and shapes."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from parity_tests.cases import Case
from parity_tests.cases_gdn import GDNDims

from ..op import BenchOp, Operand, Sweep, point_name
from . import _gdn as draws
from . import _stages
from ._stages import of_chunk

_TOKENS = 8192

# -- definitions, of tensors [heads,l,…] of one chunk


def triangle(k: torch.Tensor, beta: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """A [H_v,l,l], strictly lower."""
    products = (k @ k.transpose(1, 2)).repeat_interleave(len(beta) // len(k), 0)
    below = torch.ones(k.shape[1], k.shape[1], dtype=torch.bool, device=k.device).tril(-1)
    decay = (g[:, :, None] - g[:, None, :]).masked_fill_(~below, -math.inf).exp_()
    return products * decay * beta[:, :, None]


def inverse(A: torch.Tensor) -> torch.Tensor:
    """(I + A)^-1."""
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    return torch.linalg.solve_triangular(A, identity, upper=False, unitriangular=True)


def w_u(k, v, beta, inverse, g) -> tuple[torch.Tensor, torch.Tensor]:
    k = k.repeat_interleave(len(v) // len(k), 0)
    return inverse @ (k * (beta * g.exp())[:, :, None]), inverse @ (v * beta[:, :, None])


# -- draws


def raw_gates(case: Case) -> Operand:
    return Operand(_heads(case), "float32", partial(draws.decay, slow=bool(case.options.get("slow"))))


def gates(case: Case) -> Operand:
    """Summed up within chunks."""

    def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
        raw_gates(case).fill(tensor, generator)
        tensor.copy_(draws.within_chunks(tensor, case))

    return Operand(_heads(case), "float32", fill)


def strengths(case: Case) -> Operand:
    return Operand(_heads(case), "float32", draws.strength)


def keys(case: Case) -> dict[str, Operand]:
    B, T, H_k, K = (case.dims[key] for key in ("B", "T", "H_k", "K"))
    return {"k": Operand((B, T, H_k, K), case.dtype, draws.unit)}


def values(case: Case) -> Operand:
    B, T, H_v, V = (case.dims[key] for key in ("B", "T", "H_v", "V"))
    return Operand((B, T, H_v, V), case.dtype, draws.normal)


def triangles(case: Case, *, inverted: bool, dtype: str) -> Operand:
    """Those of keys, strengths and gates of their own, or their inverses."""

    def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
        made = {"beta": strengths(case), "g": gates(case), **keys(case)}
        drawn = {name: tensor.new_empty(operand.shape, dtype=torch.float32) for name, operand in made.items()}
        for name, operand in made.items():
            operand.fill(drawn[name], generator)
        tensor.zero_()
        for chunk in _stages.places(case)[1]:
            A = triangle(*(of_chunk(drawn[name], chunk) for name in ("k", "beta", "g")))
            A = inverse(A) if inverted else A
            tensor[chunk.b, chunk.begin : chunk.end, :, : A.shape[-1]] = A.transpose(0, 1).to(tensor.dtype)

    return Operand((*_heads(case), case.dims["L"]), dtype, fill)


def finish_w_u(case: Case, tensors: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    """w and u of the keys, the gates, values that stand in u and strengths in w: the state would not stay bounded with any."""
    del generator
    for chunk in _stages.places(case)[1]:
        k, w, u, g = (of_chunk(tensors[name], chunk) for name in ("k", "w", "u", "g"))
        beta = w[:, :, 0]
        made = w_u(k, u, beta, inverse(triangle(k, beta, g)), g)
        for name, result in zip(("w", "u"), made, strict=True):
            tensors[name][chunk.b, chunk.begin : chunk.end] = result.transpose(0, 1).to(tensors[name].dtype)


def _heads(case: Case) -> tuple[int, int, int]:
    return case.dims["B"], case.dims["T"], case.dims["H_v"]


# -- declarations


def stage(name: str, *, per_token: bool = True, fp32: bool = False, **declared: Any) -> BenchOp:
    """`per_token`: whether a table's size is tokens, or else sequences, times value heads.

    `fp32`: nothing that goes in or out has the activations' dtype.
    """

    def chunked(line: str, T: int, model: GDNDims, dtype: str, B: int = 1) -> Case:
        return Case(name, line, draws.dims(model, T, B), dtype, "float32")

    def case(size: int, statics: Mapping[str, int], dtype: str) -> Case:
        """Qwen3-Next's heads; of states, what a rank has of them, or batch rows of all."""
        if fp32 and dtype != "float32":
            raise ValueError(f"dtype: expected float32, in which models compute what {name} takes, got {dtype}")
        model = replace(draws.WIDE, **{key: statics[key] for key in ("K", "V") if key in statics})
        H_v = model.H_v if per_token else min(size, model.H_v)
        if size % H_v or H_v % 2:
            raise ValueError(f"size: expected {_SIZES[per_token]}, got {size}")
        model = replace(model, H_v=H_v, H_k=H_v // 2)
        T = size // H_v if per_token else min(_TOKENS, max(512, 4 * _TOKENS * H_v // size))
        line = point_name("T", T) if per_token else point_name("states", size)
        made = chunked(line, T, model, _stages.tuned_dtype(dtype), 1 if per_token else size // H_v)
        return made.with_dims(L=statics["chunk_size"])

    def sweep(line: str, model: GDNDims, tokens: tuple[int, ...]) -> Sweep:
        return Sweep(tokens, lambda T, dtype: chunked(point_name("T", T, line), T, model, dtype))

    defaults: dict[str, Any] = {
        "sizes": (32 * 256, 32 * 1024, 32 * _TOKENS) if per_token else (8, 32, 128),
        "sweeps": {
            "H32": sweep("Qwen3-Next (H_k=16, H_v=32)", draws.WIDE, (1024, _TOKENS)),
            "H8": sweep("Qwen3.5-397B/TP8 (H_k=2, H_v=8)", draws.NARROW, (_TOKENS,)),
        },
        "own": ("triton", "xla"),
        "untuned": {"pallas": "XLA alone runs it"},
    }
    if fp32:
        defaults |= {"tuned_dtypes": ("float32",), "run_dtypes": ("float32",)}
    declared = {**defaults, **declared}
    made = _stages.stage(
        name, single_tokens=lambda case: 256, case=case, first_sizes=declared["sizes"], grid={}, **declared
    )
    return replace(made, grid={key: _GRID[key] for key in made.spec.static_keys})


_GRID = {"K": (128,), "V": (128,), "chunk_size": (64,)}
_SIZES = {True: "a multiple of 32 value heads", False: "an even number up to 32 or a multiple of 32"}
