"""What only a GPU shows of the convolution: 64-bit offsets, and one compiled kernel for every packing."""

import itertools

import numpy as np
import pytest

from .cases import select

pytestmark = pytest.mark.gpu


def _windows(T: int):
    """Row ranges at the start, past 2^31 elements and at the end of a long prompt."""
    return [(0, 8), (T - 30_000, T - 29_980), (T - 18, T)]


def _large():
    import torch

    (case,) = (case for case in select(op="causal_conv1d", tags=("large",)) if "2^31" in case.name)
    T, D, W = (case.dims[key] for key in ("T", "D", "W"))
    torch.manual_seed(0)
    x = torch.randn(1, T, D, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    weight = torch.randn(D, W, device="cuda", dtype=torch.bfloat16)
    bounds = [0, *np.cumsum(case.options["lengths"]).tolist()]
    return x, weight, bounds


def _check(x, weight, bounds, y, final):
    import torch

    W = weight.shape[1]
    for start, stop in _windows(x.shape[1]):
        expected = torch.zeros(stop - start, x.shape[2], device="cuda", dtype=torch.float64)
        for begin, end in itertools.pairwise(bounds):
            for t in range(max(start, begin), min(stop, end)):
                for lag in range(min(W, t - begin + 1)):
                    expected[t - start] += weight[:, W - 1 - lag].double() * x[0, t - lag].double()
        error = (y[0, start:stop].double() - expected).norm() / expected.norm()
        assert error < 2.4e-3, (start, float(error))
    for n, end in enumerate(bounds[1:]):
        assert torch.equal(final[n], x[0, end - (W - 1) : end])


def test_more_than_2_31_elements_triton():
    import torch

    import triton_ssm

    x, weight, bounds = _large()
    cu_seqlens = torch.tensor(bounds, device="cuda", dtype=torch.int32)
    _check(x, weight, bounds, *triton_ssm.causal_conv1d(x, weight, cu_seqlens=cu_seqlens))


def test_more_than_2_31_elements_pallas():
    import jax
    import jax.numpy as jnp
    import torch

    import pallas_ssm

    x, weight, bounds = _large()
    torch.cuda.synchronize()
    arrays = (jax.dlpack.from_dlpack(tensor) for tensor in (x, weight))
    run = jax.jit(lambda x, weight, cu: pallas_ssm.causal_conv1d(x, weight, cu_seqlens=cu, implementation="mosaic_gpu"))
    y, final = jax.block_until_ready(run(*arrays, jnp.array(bounds, jnp.int32)))
    _check(x, weight, bounds, torch.from_dlpack(y), torch.from_dlpack(final))


def test_any_packing_reuses_one_compiled_kernel():
    import torch

    import triton_ssm
    from triton_ssm._causal_conv1d_kernel import causal_conv1d_kernel
    from triton_ssm._causal_conv1d_update_kernel import causal_conv1d_update_kernel

    def compiled() -> int:
        kernels = (causal_conv1d_kernel, causal_conv1d_update_kernel)
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    rng = np.random.default_rng(0)
    T, D, n_seq = 1500, 512, 7
    x = torch.randn(1, T, D, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(D, 4, device="cuda", dtype=torch.bfloat16)
    pool = torch.randn(64, 3, D, device="cuda", dtype=torch.bfloat16)

    def packing():
        cuts = np.sort(rng.integers(0, T + 1, n_seq))
        bounds = torch.tensor([0, *cuts.tolist()], device="cuda", dtype=torch.int32)
        slots = torch.from_numpy(rng.permutation(64)[:n_seq].astype(np.int32)).cuda()
        return bounds, slots, torch.from_numpy(rng.integers(0, 2, n_seq).astype(bool)).cuda()

    counts = []
    for _ in range(50):
        bounds, slots, has = packing()
        triton_ssm.causal_conv1d(
            x, weight, activation="silu", cu_seqlens=bounds, conv_state=pool, state_indices=slots, has_initial_state=has
        )
        triton_ssm.causal_conv1d_update(x[0], pool, weight, conv_state_indices=slots, cu_seqlens=bounds)
        counts.append(compiled())
    assert len(set(counts)) == 1, counts
    # Other totals and other numbers of sequences pick another table row at most; within one row they compile nothing.
    from ssm_configs import override

    with (
        override("causal_conv1d", BLOCK_SIZE_T=32, BLOCK_SIZE_D=128, num_warps=2),
        override("causal_conv1d_update", BLOCK_SIZE_D=128, BLOCK_SIZE_B=2, num_warps=2),
    ):
        counts = []
        for tokens, sequences in ((1500, 7), (16, 1), (1, 1), (333, 2), (1024, 64)):
            bounds = torch.linspace(0, tokens, sequences + 1, device="cuda").int()
            triton_ssm.causal_conv1d(x[:, :tokens], weight, cu_seqlens=bounds)
            triton_ssm.causal_conv1d_update(x[0, :tokens], pool, weight, cu_seqlens=bounds)
            counts.append(compiled())
    assert len(set(counts)) == 1, counts
