"""Which row of the chunk-aligned layout a token has, and the other way round. Nothing here synchronises with a GPU."""

import torch


def rows(T: int, L: int, cu_seqlens: torch.Tensor | None) -> int:
    """How many rows T tokens have."""
    if L < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {L}")
    return L * (-(-T // L) if cu_seqlens is None else T // L + len(cu_seqlens) - 1)


def token_of_row(row: torch.Tensor, L: int, bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the token in each row, whether there is one)."""
    first = bounds // L + torch.arange(len(bounds), device=bounds.device)
    # The last sequence whose first slot is not after the row's own.
    n = (torch.searchsorted(first, row // L, right=True) - 1).clamp(0, max(len(bounds) - 2, 0))
    token = bounds[n] + row - first[n] * L
    return token, token < bounds[(n + 1).clamp(max=len(bounds) - 1)]


def row_of_token(token: torch.Tensor, L: int, bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(each token's row, whether it has one)."""
    n = (torch.searchsorted(bounds, token, right=True) - 1).clamp(0, len(bounds) - 1)
    return (bounds[n] // L + n) * L + token - bounds[n], token < bounds[-1]


def take(tensor: torch.Tensor, index: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """The rows of every batch row, zeros where they are not `live`."""
    if not tensor.shape[1]:
        return tensor.new_zeros(tensor.shape[0], len(index), *tensor.shape[2:])
    found = tensor[:, index.clamp(0, tensor.shape[1] - 1)]
    return torch.where(live.view(1, -1, *(1,) * (tensor.dim() - 2)), found, 0)
