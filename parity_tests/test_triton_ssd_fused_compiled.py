"""The fused path's kernels compile for Hopper: registers, spills, shared memory, and products that stay asynchronous.

    python -m parity_tests.test_triton_ssd_fused_compiled

prints a JSON list, one object a variant. A process of its own because the interpreter, once chosen, replaces the compiler in
the whole process.
"""

import json
import sys
from typing import Any

import pytest

from .gates_apart import rows_apart, serialised

# What two heads a block may keep in local memory before and after its loop, in bytes of a thread, where options crowd it.
SLACK = 32
EVERYTHING = {"packed": True, "initial": True, "z": True, "export": 128, "aligned": 128, "pool": True}
VARIANTS: list[dict[str, Any]] = [
    {"heads": heads, **options}
    for heads in (1, 2)
    for options in (
        {},
        {"z": True},
        {"packed": True, "initial": True},
        {"packed": True, "initial": True, "z": True, "scanned": True},
        EVERYTHING,
        EVERYTHING | {"N": 64, "dtype": "fp16"},
    )
]


def gluon_source(kernel: Any, layouts: dict[str, Any], pointers: dict[str, str], constants: dict[str, Any]) -> Any:
    """As `gates_triton._source`, with descriptors of what `layouts` names: (dtype, block, layout)."""
    from triton.experimental.gluon._runtime import GluonASTSource

    constants, signature, attributes = dict(constants), {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in layouts:
            dtype, block, layout = layouts[name]
            signature[name] = f"tensordesc<{dtype}{list(block)},{layout!r}>"
        elif name in pointers:
            signature[name] = pointers[name]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in constants or name.endswith(("_ptr", "_desc")):
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        else:
            signature[name] = "i32"
            if not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def sources(
    heads: int, dtype: str = "bf16", N: int = 128, packed: bool = False, initial: bool = False, z: bool = False,
    export: int = 0, aligned: int = 0, pool: bool = False, scanned: bool = False, H: int = 128, G: int = 8, P: int = 64,
):  # fmt: skip
    from triton.experimental.gluon import language as gl

    from triton_ssm.ssd._fused_gluon_out_kernel import fused_out_kernel_hopper
    from triton_ssm.ssd._fused_gluon_state_kernel import fused_state_kernel_hopper

    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]
    tile = {width: (dtype, (64, width), gl.NVMMASharedLayout.get_default_for([64, width], element)) for width in (P, N)}
    rows = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    layouts = {
        "x_desc": tile[P], "y_desc": tile[P], "B_desc": tile[N], "C_desc": tile[N], "ab_desc": ("fp32", (heads, 128), rows),
    }  # fmt: skip
    if z:
        layouts["z_desc"] = tile[P]
    pointers = {
        "y_ptr": f"*{dtype}", "D_ptr": "*fp32", "states_ptr": "*fp32", "totals_ptr": "*fp32", "final_ptr": "*fp32",
    }  # fmt: skip
    pointers |= {"initial_ptr": "*fp32"} if initial else {}
    pointers |= {"export_ptr": "*fp32"} if export else {}
    pointers |= {"cu_seqlens_ptr": "*i32"} if packed else {}
    pointers |= {"final_indices_ptr": "*i32"} if pool else {}
    common = {"H": H, "G": G, "P": P, "N": N, "ALIGNED": aligned, "HEADS": heads}
    out = common | {"D_PER_HEADDIM": False, "SCANNED": scanned, "EXPORT": export, "STAGES": 5 - heads}
    yield fused_out_kernel_hopper, layouts, pointers, out
    yield fused_state_kernel_hopper, layouts, pointers, common | {"STAGES": 6}


def only(kernel: Any, named: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if name in kernel.arg_names}


def compiled_rows(variant: dict[str, Any]) -> list[dict[str, Any]]:
    import triton

    from .gates_triton import TARGETS, resources

    rows = []
    for kernel, layouts, pointers, constants in sources(**variant):
        source = gluon_source(kernel, only(kernel, layouts), only(kernel, pointers), constants)
        compiled = triton.compile(source, target=TARGETS["sm_90"], options={"num_warps": 4})
        row = {"kernel": kernel.__name__, "wgmma": compiled.asm["ptx"].count("wgmma.mma_async")}
        rows.append({**variant, **row, **resources(compiled), "said": serialised(compiled.asm["ptx"])})
    return rows


@pytest.mark.timeout(600)
def test_hopper_kernels_compile():
    from .gates_triton import SHARED_LIMIT

    rows = rows_apart(__name__, VARIANTS)
    assert len(rows) == 2 * len(VARIANTS)
    for row in rows:
        crowded = row["kernel"] == "fused_out_kernel_hopper" and row["heads"] == 2
        assert row["local"] <= (SLACK if crowded else 0) and not row["said"], row
        assert row["wgmma"] and row["shared"] <= SHARED_LIMIT["sm_90"], row


if __name__ == "__main__":
    print(json.dumps([row for variant in json.load(sys.stdin) for row in compiled_rows(variant)]))
