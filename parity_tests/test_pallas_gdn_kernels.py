"""The Mosaic GPU kernels of the gated delta rule: interpreted, with race detection, against the oracle; and compiled."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_ssm.gdn

from .interpret_mosaic import interpreted
from .oracle import gdn as oracle
from .test_pallas_gates import compile_apart
from .test_pallas_gdn import STAGE, draw, relative, same

gdn: Any = pallas_ssm.gdn  # NumPy's arrays are as good as JAX's
# One block of a device of this capability, by NVIDIA's programming guide.
SHARED_LIMIT = 232_448


def problem(
    T: int = 100,
    cu_seqlens: list[int] | None = None,
    dtype: str = "bfloat16",
    *,
    B: int = 1,
    seed: int = 0,
    **more: Any,
) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """(q, k, v, h) and the other arguments of `chunk_o`. Slots without a chunk hold NaN."""
    sizes = {"H_k": 1, "H_v": 2, "K": 64, "V": 64}
    sizes |= {name: more.pop(name) for name in sizes if name in more}
    d = draw(B, T, **sizes, dtype=dtype, seed=seed)
    bounds = None if cu_seqlens is None else np.array(cu_seqlens, np.int32)
    g = oracle.chunk_local_cumsum(d["g"], cu_seqlens=bounds).astype(np.float32)
    NC = -(-T // 64) if bounds is None else T // 64 + len(bounds) - 1
    state = (sizes["K"], sizes["V"]) if more.get("state_layout") != "VK" else (sizes["V"], sizes["K"])
    h = np.random.default_rng(seed).standard_normal((B, NC, sizes["H_v"], *state)).astype(d["q"].dtype)
    if bounds is not None:
        starts = [(begin // 64 + n, end - begin) for n, (begin, end) in enumerate(itertools.pairwise(bounds))]
        slots = {start + chunk for start, length in starts for chunk in range(-(-length // 64))}
        h[:, [slot for slot in range(NC) if slot not in slots]] = np.nan
    return (d["q"], d["k"], d["v"], h), {"g": g, "cu_seqlens": bounds} | more


def by_kernel(arguments: tuple[np.ndarray, ...], keywords: dict[str, Any]) -> np.ndarray:
    with interpreted():
        o = jax.block_until_ready(gdn.chunk_o(*arguments, **keywords, implementation="mosaic_gpu"))
    return np.asarray(o)


def check(arguments: tuple[np.ndarray, ...], keywords: dict[str, Any], few: float = 1.0) -> None:
    dtype = "float16" if arguments[0].dtype == np.float16 else "bfloat16"
    o, expected = by_kernel(arguments, keywords), oracle.chunk_o(*arguments, **keywords)
    assert o.dtype == arguments[2].dtype and relative(o, expected) <= few * STAGE[dtype]
    assert not o[expected == 0].any(), "a row without a token is not zero"


CASES: dict[str, dict[str, Any]] = {
    "a model's heads": {"T": 128, "K": 128, "V": 128},
    "a chunk begun, two rows": {"B": 2},
    "three heads a key, states the other way": {"H_v": 3, "K": 128, "state_layout": "VK", "gate_base": "2"},
    "heads of one key in several blocks": {"T": 64, "H_v": 16},
    "no gate": {"dtype": "float16", "g": None, "scale": 0.3},
    "packed": {"cu_seqlens": [0, 5, 5, 70, 97], "H_k": 2, "H_v": 4},
    "packed, whole chunks": {"T": 130, "cu_seqlens": [0, 64, 130], "V": 128},
    "packed, all padding": {"T": 70, "cu_seqlens": [0, 0, 0]},
}


@pytest.mark.parametrize("name", CASES)
def test_chunk_o(name: str):
    check(*problem(**CASES[name]))


@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_drawn_chunk_o(data):
    sizes = {name: data.draw(st.sampled_from([64, 128])) for name in ("K", "V")}
    H_k = data.draw(st.integers(1, 2))
    lengths = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=3))
    T = max(1, sum(lengths) + data.draw(st.integers(0, 70)))
    heads = {"H_k": H_k, "H_v": H_k * data.draw(st.integers(1, 3))}
    dtype = data.draw(st.sampled_from(["bfloat16", "float16"]))
    check(*problem(T, [0, *np.cumsum(lengths).tolist()], dtype, **sizes, **heads), few=2.0)


def test_neighbours_do_not_matter():
    bounds = [0, 20, 90, 117]
    arguments, keywords = problem(120, bounds)
    clean = by_kernel(arguments, keywords)
    for n in range(3):
        own = (np.arange(120) >= bounds[n]) & (np.arange(120) < bounds[n + 1])
        poisoned = [np.where(own[:, None, None], a, np.nan).astype(a.dtype) for a in arguments[:3]]
        slots = np.arange(4)
        mine = (slots >= bounds[n] // 64 + n) & (slots < bounds[n] // 64 + n + -(-(bounds[n + 1] - bounds[n]) // 64))
        h = np.where(mine[:, None, None, None], arguments[3], np.nan).astype(arguments[3].dtype)
        g = np.where(own[:, None], keywords["g"], np.nan).astype(np.float32)
        o = by_kernel((*poisoned, h), keywords | {"g": g})
        assert same(o[:, own], clean[:, own])
        assert not o[:, 117:].any()


def test_gradients_and_vmap():
    arguments, keywords = problem(70, [0, 30, 66])
    arguments = (*arguments[:3], np.nan_to_num(arguments[3]))
    weight = np.random.default_rng(1).standard_normal(arguments[2].shape).astype(np.float32)

    def loss(implementation: str, *arguments: Any):
        o = gdn.chunk_o(*arguments, **keywords, implementation=implementation)
        return (o.astype(jnp.float32) * weight).sum()

    with interpreted():
        got = jax.block_until_ready(jax.grad(functools.partial(loss, "mosaic_gpu"), argnums=(0, 1, 2, 3))(*arguments))
    expected = jax.grad(functools.partial(loss, "xla"), argnums=(0, 1, 2, 3))(*arguments)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))

    batch = tuple(jnp.stack([a, a]) for a in arguments)
    with interpreted():
        o = jax.vmap(lambda *a: gdn.chunk_o(*a, **keywords))(*batch)
        with pytest.raises(NotImplementedError, match=r"chunk_o: the mosaic_gpu kernel is not batched by jax.vmap"):
            jax.vmap(lambda *a: gdn.chunk_o(*a, **keywords, implementation="mosaic_gpu"))(*batch)
    assert relative(o[1], np.asarray(gdn.chunk_o(*arguments, **keywords, implementation="xla"), np.float64)) < 1e-2


REFUSED = [
    ({"K": 60}, "needs K and V in multiples of 64, got K=60, V=64"),
    ({"V": 512}, "takes V up to 256, got 512"),
    ({"dtype": "float32"}, "takes 16-bit inputs, got float32"),
    ({"chunk_size": 32, "T": 32}, "needs chunk_size=64, got 32"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[next(iter(change)) for change, _ in REFUSED])
def test_what_the_kernel_does_not_take(change: dict[str, Any], reason: str):
    options: dict[str, Any] = {"T": 40} | change
    arguments, keywords = problem(**options)
    with interpreted(), pytest.raises(NotImplementedError, match=f"gdn.chunk_o: the mosaic_gpu kernel {reason}"):
        gdn.chunk_o(*arguments, **keywords, implementation="mosaic_gpu")


# Keywords of `problem`'s sizes; N_seq: packed sequences.
COMPILED: list[dict[str, Any]] = [
    {"T": 8192, "H_k": 16, "H_v": 32},
    {"T": 8192, "H_k": 16, "H_v": 32, "N_seq": 8},
    {"T": 8192, "H_k": 16, "H_v": 64, "state_layout": "VK"},
    {"T": 100, "H_k": 16, "H_v": 48, "dtype": "float16", "gated": False},
    {"T": 133, "H_k": 2, "H_v": 2, "K": 64, "V": 64, "N_seq": 3},
    {"T": 4096, "H_k": 2, "H_v": 4, "K": 256, "V": 256, "N_seq": 4},
    {"T": 2**21, "H_k": 16, "H_v": 32},  # more than 2^31 elements
]


def compile_rows(rows: list[dict[str, Any]]) -> list[dict[str, int]]:
    """What ptxas says of each. In a process of its own, where nothing is interpreted."""
    import tempfile
    from pathlib import Path

    from .gates_mosaic import Compiler

    with tempfile.TemporaryDirectory() as dump:
        compiler, found = Compiler("sm_90a", Path(dump)), []
        for row in rows:
            T, H_k, H_v, N_seq = row["T"], row["H_k"], row["H_v"], row.get("N_seq")
            K, V, dtype = row.get("K", 128), row.get("V", 128), row.get("dtype", "bfloat16")
            NC = -(-T // 64) if N_seq is None else T // 64 + N_seq
            layout = row.get("state_layout", "KV")
            arrays: dict[str, Any] = {name: ((1, T, H_k, K), dtype) for name in "qk"}
            arrays |= {
                "v": ((1, T, H_v, V), dtype),
                "h": ((1, NC, H_v, *((K, V) if layout == "KV" else (V, K))), dtype),
            }
            if row.get("gated", True):
                arrays["g"] = (1, T, H_v), "float32"
            if N_seq is not None:
                arrays["cu_seqlens"] = (N_seq + 1,), "int32"
            compiler.compile(arrays, functools.partial(gdn.chunk_o, state_layout=layout, implementation="mosaic_gpu"))
            found.append(compiler.resources())
    return found


def test_compiled_kernels_spill_nothing():
    code = f"import json, sys; from {__name__} import *; print(json.dumps(compile_rows(json.load(sys.stdin))))"
    results = compile_apart("-c", code, rows=COMPILED)
    for row, result in zip(COMPILED, results, strict=True):
        assert result["spill_bytes"] == result["stack_bytes"] == 0, (row, result)
        assert 0 < result["registers"] <= 255 and result["shared_bytes"] <= SHARED_LIMIT, (row, result)
    # Room for two blocks an SM of the sizes that models have: one loads while the other multiplies.
    assert 2 * (results[0]["shared_bytes"] + 1024) <= SHARED_LIMIT
