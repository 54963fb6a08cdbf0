"""A million tokens, eight times 2^31 elements: the fused scan of both packages, whole and split."""

from collections.abc import Callable
from typing import Any

import pytest

from .tolerances import TOLERANCES

pytestmark = pytest.mark.gpu

T, H, G, P, N, L = 1 << 20, 128, 8, 64, 128, 128
# Within a chunk, and so that the two parts have other pieces than the whole.
CUT = T - 100_001
LAST = 200


def _triton() -> Callable[..., tuple[Any, Any]]:
    import triton_ssm

    def run(x, dt, A, B, C, D, initial):
        return triton_ssm.mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size=L, D=D, initial_states=initial, return_final_states=True
        )

    return run


def _pallas() -> Callable[..., tuple[Any, Any]]:
    import jax
    import torch

    import pallas_ssm

    def scan(x, dt, A, B, C, D, initial):
        return pallas_ssm.mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size=L, D=D, initial_states=initial, return_final_states=True,
            implementation="mosaic_gpu",
        )  # fmt: skip

    jitted = jax.jit(scan)

    def run(*tensors):
        torch.cuda.synchronize()
        arrays = (None if tensor is None else jax.dlpack.from_dlpack(tensor) for tensor in tensors)
        y, final = jax.block_until_ready(jitted(*arrays))
        return torch.from_dlpack(y), torch.from_dlpack(final)

    return run


@pytest.mark.parametrize("twin", [_triton, _pallas])
def test_a_split_million_tokens(twin: Callable[[], Callable[..., tuple[Any, Any]]]):
    import torch

    torch.manual_seed(0)
    torch.cuda.empty_cache()

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()

    x, B, C = normal(1, T, H, P), normal(1, T, G, N), normal(1, T, G, N)
    dt = torch.empty(1, T, H, device="cuda", dtype=torch.bfloat16).uniform_(1e-3, 2e-2)
    # Slow: what came before the cut is still there at the end.
    A = torch.full((H,), -5e-4, device="cuda")
    D = torch.randn(H, device="cuda")
    assert x.numel() > 2**32
    run = twin()
    y, final = run(x, dt, A, B, C, D, None)
    _, state = run(x[:, :CUT], dt[:, :CUT], A, B[:, :CUT], C[:, :CUT], D, None)
    y_rest, final_rest = run(x[:, CUT:], dt[:, CUT:], A, B[:, CUT:], C[:, CUT:], D, state)

    def error(found: torch.Tensor, expected: torch.Tensor) -> float:
        return ((found.double() - expected.double()).norm() / expected.double().norm()).item()

    limit = TOLERANCES["mamba_chunk_scan_combined", "bfloat16"].relative
    assert error(y_rest[:, -LAST:], y[:, -LAST:]) < limit
    assert error(y_rest[:, :LAST], y[:, CUT : CUT + LAST]) < limit
    assert error(final_rest, final) < limit
