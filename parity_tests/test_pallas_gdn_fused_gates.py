"""The fused kernels of `chunk_gated_delta_rule` compile for the H200 without a GPU: registers, spills, shared memory."""

import tempfile
from pathlib import Path
from typing import Any

from .test_pallas_gates import compile_apart

SHARED_LIMIT = 232_448
# Of an SM, of which a block takes 1 KB for itself; and registers.
SM_SHARED, BLOCK_SHARED, SM_REGISTERS = 233_472, 1024, 65_536

# N_seq: packed sequences.
ROWS: list[dict[str, Any]] = [
    {"T": 8192, "H_k": 16, "H_v": 32},
    {"T": 8192, "H_k": 2, "H_v": 8, "N_seq": 8, "initial": True},
    {"T": 100, "H_k": 3, "H_v": 9, "dtype": "float16", "K": 64, "V": 64, "norm": False},
    {"T": 4096, "H_k": 16, "H_v": 16, "V": 256, "N_seq": 3, "final": False},
    {"T": 2**20, "H_k": 16, "H_v": 32},  # 2^32 elements of v
    {"T": 8000, "H_k": 2, "H_v": 8, "segments": True},
    {"T": 8192, "H_k": 2, "H_v": 4, "N_seq": 1, "initial": True, "segments": True},
]


def compile_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By kernel what ptxas says of it. In a process of its own, where nothing is interpreted."""
    from .gates_mosaic import Compiler

    with tempfile.TemporaryDirectory() as dump:
        compiler, found = Compiler("sm_90a", Path(dump)), []
        import pallas_ssm

        for row in rows:
            T, H_k, H_v, N_seq = row["T"], row["H_k"], row["H_v"], row.get("N_seq")
            K, V, dtype = row.get("K", 128), row.get("V", 128), row.get("dtype", "bfloat16")
            arrays: dict[str, Any] = {name: ((1, T, H_k, K), dtype) for name in "qk"}
            arrays |= {"v": ((1, T, H_v, V), dtype)} | {name: ((1, T, H_v), "float32") for name in ("g", "beta")}
            if row.get("initial"):
                arrays["initial_state"] = (N_seq or 1, H_v, K, V), "float32"
            if N_seq is not None:
                arrays["cu_seqlens"] = (N_seq + 1,), "int32"
            options: dict[str, Any] = {
                "use_qk_l2norm": row.get("norm", True),
                "return_final_state": row.get("final", True),
            }

            def call(options: dict[str, Any] = options, **arrays: Any) -> Any:
                return pallas_ssm.chunk_gated_delta_rule(**arrays, **options, implementation="mosaic_gpu")

            compiler.compile(arrays, call)
            # wgmma that waits for the one before, however it was asked for.
            serialised = [line for line in compiler.said().splitlines() if line.startswith("ptxas") and "wgmma" in line]
            found.append({"kernels": compiler.kernels(), "serialised": serialised})
    return found


def test_compiled_kernels_spill_nothing():
    code = f"import json, sys; from {__name__} import *; print(json.dumps(compile_rows(json.load(sys.stdin))))"
    for row, found in zip(ROWS, compile_apart("-c", code, rows=ROWS), strict=True):
        assert set(found["kernels"]) == {"gdn_prepare", "gdn_loop", *["gdn_ends"] * row.get("segments", False)}
        assert not found["serialised"], (row, found)
        for kernel in found["kernels"].values():
            assert kernel["spill_bytes"] == kernel["stack_bytes"] == 0, (row, found)
            assert kernel["shared_bytes"] <= SHARED_LIMIT, (row, found)
        # Two warpgroups of the second kernel; two blocks an SM of the first.
        prepare, loop = found["kernels"]["gdn_prepare"], found["kernels"]["gdn_loop"]
        assert 2 * 128 * loop["registers"] <= SM_REGISTERS, (row, found)
        if row.get("V", 128) <= 128:
            assert 2 * (prepare["shared_bytes"] + BLOCK_SHARED) <= SM_SHARED, (row, found)
            assert 2 * 128 * prepare["registers"] <= SM_REGISTERS, (row, found)
