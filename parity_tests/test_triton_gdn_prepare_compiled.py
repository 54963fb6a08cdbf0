"""`gdn_prepare` compiles for Hopper: registers, no spills, shared memory for three programs an SM, copies of 16 bytes.

    python -m parity_tests.test_triton_gdn_prepare_compiled

prints a JSON list, one object a variant. A process of its own because the interpreter, once chosen, replaces the compiler in
the whole process.
"""

import json
import re
import sys
from typing import Any

import pytest

from .gates_apart import rows_apart, serialised

H_K, H_V = 16, 32
VARIANTS: list[dict[str, Any]] = [
    {"heads": 2},
    {"heads": 1, "packed": True},
    {"heads": 2, "packed": True, "dtype": "fp16", "L2NORM": False},
    {"heads": 2, "K": 64},
    {"heads": 1, "K": 64, "dtype": "fp16"},
]
# What an SM has for the programs that share it, less what each of them costs besides.
SHARED_OF_THREE = (228 - 3) * 1024


def compiled_row(
    heads: int, K: int = 128, dtype: str = "bf16", packed: bool = False, L2NORM: bool = True
) -> dict[str, Any]:  # fmt: skip
    import triton

    from triton_ssm.gdn import _prepare
    from triton_ssm.gdn._prepare_kernel import gdn_prepare_kernel

    from .gates_triton import TARGETS, resources
    from .test_triton_ssd_fused_compiled import gluon_source

    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("q", "k", "PX", "Y")} | {
        f"{name}_ptr": "*fp32" for name in ("g", "beta", "gates")
    }
    pointers |= {"cu_seqlens_ptr": "*i32"} if packed else {}
    constants = {"H_K": H_K, "H_V": H_V, "K": K, "L2NORM": L2NORM, "HEADS": heads}
    source = gluon_source(gdn_prepare_kernel, {}, pointers, constants)
    source.signature["scale"] = "fp32"
    source.attrs.pop((gdn_prepare_kernel.arg_names.index("scale"),))
    options = {"num_warps": 4, "maxnreg": _prepare._REGISTERS}
    compiled = triton.compile(source, target=TARGETS["sm_90"], options=options)
    text = compiled.asm["ptx"]
    return {
        "heads": heads, "K": K, **resources(compiled),
        "wgmma": len(re.findall(r"wgmma\.mma_async", text)), "tf32": len(re.findall(r"mma\.sync.*tf32", text)),
        "copies": len(re.findall(r"cp\.async\.c[ag].*0x10", text)), "limit": _prepare._REGISTERS,
        "said": serialised(text),
    }  # fmt: skip


@pytest.mark.timeout(600)
def test_hopper_kernel_compiles():
    rows = rows_apart(__name__, VARIANTS)
    assert len(rows) == len(VARIANTS)
    for row in rows:
        heads, K = row["heads"], row["K"]
        assert row["registers"] <= row["limit"] and row["limit"] * 128 * 3 <= 65536, row
        assert 3 * row["shared"] <= SHARED_OF_THREE and not row["said"], row
        # Steps of 16: q·k and k·k, P·X and Y. The merges take 60 steps a head.
        assert row["wgmma"] == 2 * K // 16 + heads * 2 * (64 // 16) and row["tf32"] == 60 * heads, row
        assert row["local"] == 0 and row["copies"] == 2 * K // 16, row


if __name__ == "__main__":
    print(json.dumps([compiled_row(**variant) for variant in json.load(sys.stdin)]))
