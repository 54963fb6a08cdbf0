"""The buffer for o."""

from typing import Any

import torch

from .. import _arguments


def output_like(v: torch.Tensor, out: Any, *, dense: bool = True) -> torch.Tensor:
    """`out`, if it fits v and is dense (or its rows are), else a new tensor."""
    if out is None:
        return torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out: expected a torch.Tensor, got {type(out).__name__}")
    if out.device != v.device:
        raise ValueError(f"out: expected device {v.device}, where v is, got {out.device}")
    if out.dtype != v.dtype:
        wanted, got = _arguments.dtype_name(v.dtype), _arguments.dtype_name(out.dtype)
        raise TypeError(f"out: expected the dtype of v, {wanted}, got {got}")
    if out.shape != v.shape:
        raise ValueError(f"out: expected shape {tuple(v.shape)}, got {tuple(out.shape)}")
    if not (out.is_contiguous() if dense else _arguments.has_dense_rows(out)):
        raise ValueError(
            f"out: expected {'a dense tensor' if dense else 'every row dense'}, got strides {out.stride()}"
        )
    _arguments.check_output(out)
    return out
