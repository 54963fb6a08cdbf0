"""The SSD kernels compile with their written heuristics: no spills, no more shared memory than there is, no product lost.

    echo '[{"arch": "sm_90"}]' | python -m parity_tests.test_triton_ssd_compiled

prints a JSON list with a list for each architecture, one object a kernel. A process of its own because the interpreter, once
chosen, replaces the compiler in the whole process.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from .gates_apart import rows_apart

DEVICES = {
    "sm_80": ("NVIDIA A100", (8, 0)), "sm_90": ("NVIDIA H200", (9, 0)), "sm_120": ("NVIDIA RTX PRO 6000", (12, 0)),
    "gfx942": ("AMD Instinct MI300X", None),
}  # fmt: skip
SIZES = {"sm_90": ((64, 128), (80, 128), (128, 256), (16, 16))}


def lost_products(compiled: Any) -> int:
    """Tensor-core instructions that nobody reads: what ptxas leaves of a product that it wrongly takes for dead."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout
    return len(re.findall(r"[HQ]GMMA\S+ RZ,", text))


def sources(arch: str, dtype: str, P: int, N: int, L: int = 128):
    """(kernel, pointers, constants, num_warps) of a packed call with everything."""
    from ssm_configs import SPECS, Device
    from ssm_configs.contracts.ssd import Dims
    from triton_ssm.ssd import _bmm_chunk_kernel as bmm
    from triton_ssm.ssd import _chunk_cumsum_kernel as cumsum
    from triton_ssm.ssd import _chunk_scan_kernel as scan
    from triton_ssm.ssd import _chunk_state_kernel as state
    from triton_ssm.ssd import _plan
    from triton_ssm.ssd import _state_passing_kernel as passing

    short = {"float32": "*fp32", "bfloat16": "*bf16"}[dtype]
    device, H, G = Device(*DEVICES[arch]), 128, 8
    plan = _plan.Plan(Dims(1, 0, H, G, P, N, L, 0, 1, True, 0), (), {}, device, dtype)
    given = {"nheads": H, "headdim": P, "dstate": N, "chunk_size": L}

    def config(op: str):
        spec = SPECS[op]
        table = spec.table_dtype(dtype) if dtype in (*spec.dtypes, *spec.dtype_aliases) else "float32"
        return spec.heuristic({key: given[key] for key in spec.static_keys}, table, device, 0)

    common = {"H": H, "G": G, "P": P, "N": N, "L": L, "ALIGNED": 0, "PRECISION": plan.products("ieee")}
    chunked = {"dt_ptr": "*fp32", "dA_cumsum_ptr": "*fp32", "states_ptr": "*fp32", "cu_seqlens_ptr": "*i32"}
    c = config("ssd_chunk_cumsum")
    yield (
        cumsum.chunk_cumsum_kernel,
        {"dt_ptr": short, "A_ptr": "*fp32", "dt_bias_ptr": "*fp32", "dA_cumsum_ptr": "*fp32", "step_ptr": "*fp32",
         "cu_seqlens_ptr": "*i32", "dt_min": "fp32", "dt_max": "fp32"},
        {"H": H, "L": L, "DT_SOFTPLUS": True, "BLOCK_SIZE_H": c["BLOCK_SIZE_H"], "BLOCK_SIZE_T": min(c["BLOCK_SIZE_T"], L)},
        c["num_warps"],
    )  # fmt: skip
    c = config("ssd_chunk_state")
    yield (
        state.chunk_state_kernel,
        {"x_ptr": short, "B_ptr": short} | chunked,
        common | {"BLOCK_SIZE_M": _plan.block(c["BLOCK_SIZE_M"], P), "BLOCK_SIZE_N": _plan.block(c["BLOCK_SIZE_N"], N),
                  "BLOCK_SIZE_K": _plan.block(c["BLOCK_SIZE_K"], L), "STAGES": c["num_stages"]},
        c["num_warps"],
    )  # fmt: skip
    c = config("ssd_state_passing")
    yield (
        passing.state_passing_kernel,
        {f"{name}_ptr": "*fp32" for name in ("states", "dA_cumsum", "initial", "before", "after", "final")}
        | {"slots_ptr": "*i32", "cu_seqlens_ptr": "*i32"},
        {"H": H, "SIZE": P * N, "L": L, "CHUNKS_PER_EXPORT": 2, "BLOCK_SIZE": min(c["BLOCK_SIZE"], P * N),
         "STAGES": c["num_stages"]},
        c["num_warps"],
    )  # fmt: skip
    c = config("ssd_bmm_chunk")
    shared = {name: value for name, value in common.items() if name not in ("H", "P")}
    yield (
        bmm.bmm_chunk_kernel,
        {"C_ptr": short, "B_ptr": short, "CB_ptr": "*fp32", "cu_seqlens_ptr": "*i32"},
        shared | {"CAUSAL": True, "BLOCK_SIZE_M": _plan.block(c["BLOCK_SIZE_M"], L),
                  "BLOCK_SIZE_N": _plan.block(c["BLOCK_SIZE_N"], L), "BLOCK_SIZE_K": _plan.block(c["BLOCK_SIZE_K"], N)},
        c["num_warps"],
    )  # fmt: skip
    c = config("ssd_chunk_scan")
    yield (
        scan.chunk_scan_kernel,
        {"CB_ptr": "*fp32", "x_ptr": short, "C_ptr": short, "D_ptr": "*fp32", "z_ptr": short, "y_ptr": short} | chunked,
        common | {"D_PER_HEADDIM": False, "BLOCK_SIZE_M": _plan.block(c["BLOCK_SIZE_M"], L),
                  "BLOCK_SIZE_N": _plan.block(c["BLOCK_SIZE_N"], P), "BLOCK_SIZE_K": _plan.block(c["BLOCK_SIZE_K"], L),
                  "BLOCK_SIZE_DSTATE": _plan.block(c["BLOCK_SIZE_DSTATE"], N), "STAGES": c["num_stages"]},
        c["num_warps"],
    )  # fmt: skip


def compiled_rows(arch: str) -> list[dict[str, Any]]:
    import triton

    from .gates_triton import TARGETS, _source, resources

    rows = []
    for dtype in ("bfloat16", "float32"):
        for P, N in SIZES.get(arch, ((64, 128), (64, 256))):
            for kernel, pointers, constants, num_warps in sources(arch, dtype, P, N):
                source = _source(kernel, pointers, constants)
                compiled = triton.compile(source, target=TARGETS[arch], options={"num_warps": num_warps})
                lost = lost_products(compiled) if "cubin" in compiled.asm else 0
                name = f"{kernel.__name__} {dtype} P={P} N={N}"
                rows.append({"kernel": name, "lost": lost, **resources(compiled)})
    return rows


@pytest.mark.timeout(600)
def test_heuristics_compile():
    from .gates_triton import SHARED_LIMIT

    found: Any = rows_apart(__name__, [{"arch": arch} for arch in DEVICES])
    for arch, rows in zip(DEVICES, found, strict=True):
        assert len(rows) == 2 * 5 * len(SIZES.get(arch, "12"))
        for row in rows:
            assert row["local"] == 0 and row["lost"] == 0 and row["shared"] <= SHARED_LIMIT[arch], (arch, row)


if __name__ == "__main__":
    print(json.dumps([compiled_rows(**wanted) for wanted in json.load(sys.stdin)]))
