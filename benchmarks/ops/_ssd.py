"""What the SSD operators have in common: models, draws as models initialise, and other libraries' chunks."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from parity_tests.cases import MAMBA2_MODELS, Case, Mamba2Dims

from ..op import BenchOp, Operand, Sweep, point_name
from . import _stages
from ._gdn import check_options
from ._gdn import normal as normal

_BY_NAME = {model.name: model for model in MAMBA2_MODELS}
NEMOTRON, MAMBA2 = _BY_NAME["Nemotron-H-8B"], _BY_NAME["Mamba2-2.7B"]
_TOKENS = 8192
_UNITS = {"H": "heads", "G": "groups"}
_KNOWN = ("D", "lengths", "initial", "slow")


def decay_rate(tensor: torch.Tensor, generator: torch.Generator, slow: bool) -> None:
    """A."""
    tensor.uniform_(*((1e-3, 0.1) if slow else (1, 16)), generator=generator).neg_()


def step_bias(tensor: torch.Tensor, generator: torch.Generator, slow: bool) -> None:
    """Mamba-2's initialisation: softplus(dt_bias) is log-uniform in [1e-3, 1e-1]."""
    step = tensor.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
    if slow:
        step.fill_(7e-3)
    tensor.copy_(step + torch.log(-torch.expm1(-step)))


def dims(case: Case, *names: str) -> list[int]:
    """ValueError where the case asks for what the stages' declarations do not draw."""
    check_options(case, _KNOWN)
    return [case.dims[name] for name in names]


def tokens(case: Case) -> int:
    return case.dims["B"] * case.dims["T"]


# -- what `chunk_cumsum` returns; a stage takes any, so each is drawn by itself


def chunked(case: Case) -> dict[str, Operand]:
    """dt and dA_cumsum [B,H,NC,L]; NaN where no chunk stands."""
    shape = (case.dims["B"], case.dims["H"], _stages.places(case)[0], case.dims["L"])
    return {
        "dt": Operand(shape, "float32", partial(_steps, case=case)),
        "dA_cumsum": Operand(shape, "float32", partial(_decays, case=case)),
    }


def _steps(tensor: torch.Tensor, generator: torch.Generator, case: Case) -> None:
    tensor.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
    live = torch.zeros(tensor.shape[0], *tensor.shape[2:], dtype=torch.bool)
    for chunk in _stages.places(case)[1]:
        live[chunk.b, chunk.slot, : chunk.end - chunk.begin] = True
    tensor.masked_fill_(~live[:, None].to(tensor.device), 0.0)
    for b, slot in _stages.unused(case):
        tensor[b, :, slot] = math.nan


def _decays(tensor: torch.Tensor, generator: torch.Generator, case: Case) -> None:
    _steps(tensor, generator, case)
    rates = tensor.new_empty(tensor.shape[1])
    decay_rate(rates, generator, slow=bool(case.options.get("slow")))
    tensor.copy_(tensor.mul_(rates[:, None, None]).cumsum(-1))


def chunk_bounds(T: int, chunk_size: int, device: torch.device) -> torch.Tensor:
    """vLLM's cu_chunk_seqlens, of one sequence."""
    return torch.tensor([*range(0, T, chunk_size), T], dtype=torch.int32, device=device)


# -- declarations


def stage(name: str, *, per_token: str, fp32: bool = False, **declared: Any) -> BenchOp:
    """`per_token`: the dimension that a table's size has besides tokens, or "" for none; of states, sequences' heads.

    `fp32`: nothing that goes in or out has the activations' dtype.
    """

    def scan(line: str, T: int, model: Mamba2Dims, dtype: str, B: int = 1) -> Case:
        dims = {"B": B, "T": T, "H": model.H, "G": model.G, "P": model.P, "N": model.N, "L": model.chunk_size}
        return Case(name, line, dims, dtype, "float32", {"D": True})

    def case(size: int, statics: Mapping[str, int], dtype: str) -> Case:
        """Nemotron-H-8B's heads and groups unless the table says how many; of states, batch rows of all or a rank's share."""
        named = {"nheads": "H", "headdim": "P", "dstate": "N", "chunk_size": "chunk_size"}
        model = replace(NEMOTRON, **{named[key]: value for key, value in statics.items()})
        if model.H % model.G:
            model = replace(model, G=1)
        dtype = _stages.tuned_dtype(dtype)
        if per_token == "states":
            H = min(size, model.H)
            if size % H or H % model.G:
                raise ValueError(
                    f"size: expected a multiple of {model.G} up to {model.H} or a multiple of {model.H}, got {size}"
                )
            return scan(
                point_name("states", size), max(1024, _TOKENS * H // size), replace(model, H=H), dtype, size // H
            )
        unit = getattr(model, per_token) if per_token else 1
        if size % unit:
            raise ValueError(f"size: expected a multiple of {unit} {_UNITS[per_token]}, got {size}")
        return scan(point_name("T", size // unit), size // unit, model, dtype)

    def sweep(line: str, model: Mamba2Dims, tokens: tuple[int, ...]) -> Sweep:
        return Sweep(tokens, lambda T, dtype: scan(point_name("T", T, line), T, model, dtype))

    unit = getattr(NEMOTRON, per_token, 1) if per_token else 1
    sizes = (16, 128, 512) if per_token == "states" else (128 * unit, 1024 * unit, _TOKENS * unit)
    return _stages.stage(
        name,
        single_tokens=lambda case: case.dims["L"],
        case=case,
        **{
            "sizes": sizes,
            "first_sizes": sizes,
            "sweeps": {
                "H128": sweep("Nemotron-H-8B (H=128, G=8)", NEMOTRON, (1024, _TOKENS)),
                "H80": sweep("Mamba2-2.7B (H=80, G=1)", MAMBA2, (_TOKENS,)),
            },
            "untuned": {"pallas": "its kernel's blocks follow from the shape alone"},
            **({"tuned_dtypes": ("float32",), "run_dtypes": ("float32",)} if fp32 else {}),
            **declared,
        },
    )
