"""What the fused scan takes beside its inputs and outputs, at 131,072 tokens of Nemotron-H-8B."""

from typing import Any

import pytest

pytestmark = pytest.mark.gpu

T, H, G, P, N, L = 131_072, 128, 8, 64, 128, 128
LIMIT = 1.2


def _bytes() -> int:
    """x, y, dt, B and C in 16 bits; A, D, dt_bias and the final state in fp32."""
    return 2 * T * (2 * H * P + H + 2 * G * N) + 4 * (3 * H + H * P * N)


def test_triton_peak():
    import torch

    import triton_ssm

    def normal(*shape: int, dtype: "torch.dtype" = torch.bfloat16) -> "torch.Tensor":
        return torch.randn(shape, device="cuda", dtype=dtype)

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    x, dt, B, C = normal(1, T, H, P), normal(1, T, H), normal(1, T, G, N), normal(1, T, G, N)
    A, D, bias = (normal(H, dtype=torch.float32) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    y, final = triton_ssm.mamba_chunk_scan_combined(
        x, dt, -A.exp(), B, C, chunk_size=L, D=D, dt_bias=bias, dt_softplus=True, return_final_states=True
    )
    ratio = (torch.cuda.max_memory_allocated() - before) / _bytes()
    assert y.isfinite().all() and final is not None
    print(f"triton: peak memory {ratio:.3f} of inputs and outputs")
    assert 1 < ratio <= LIMIT


def test_pallas_peak():
    import jax
    import jax.numpy as jnp

    import pallas_ssm

    def abstract(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def call(x, dt, A, B, C, D, bias):
        return pallas_ssm.mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size=L, D=D, dt_bias=bias, dt_softplus=True, return_final_states=True,
            implementation="mosaic_gpu",
        )  # fmt: skip

    vector = abstract(H, dtype="float32")
    group = abstract(1, T, G, N)
    compiled = (
        jax.jit(call).lower(abstract(1, T, H, P), abstract(1, T, H), vector, group, group, vector, vector).compile()
    )
    used: Any = compiled.memory_analysis()
    total = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
    ratio = total / _bytes()
    print(f"pallas: peak memory {ratio:.3f} of inputs and outputs")
    assert 1 <= ratio <= LIMIT
