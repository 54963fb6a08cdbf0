"""The fused path's kernels after the first compile for Hopper: registers, spills, shared memory, and products that stay
asynchronous.

    python -m parity_tests.test_triton_gdn_fused_gates < variants.json

prints a JSON list, one object a variant. A process of its own because the interpreter, once chosen, replaces the compiler in
the whole process.
"""

import json
import re
import sys
from typing import Any

import pytest

from .gates_apart import machine_code, rows_apart, serialised
from .gates_triton import SHARED_LIMIT, TARGETS, _source, resources
from .test_triton_ssd_fused_compiled import gluon_source

# Bytes of a thread: what the feeding warp may keep in local memory where options crowd it.
SLACK = 16
VARIANTS: list[dict[str, Any]] = [
    {},
    {"packed": True, "initial": "fp32"},
    {"warpgroups": 2},
    {"warpgroups": 2, "packed": True, "initial": "fp32"},
    {"warpgroups": 2, "dtype": "fp16", "K": 64, "stages": 4},
    {"packed": True, "initial": "bf16", "final": False, "V": 256, "stages": 2},
    {"dtype": "fp16", "K": 64, "V": 64, "stages": 4},
    {"dtype": "fp16", "K": 64, "packed": True, "initial": "fp32", "stages": 4, "H_K": 2, "H_V": 8},
    {"initial": "fp32", "final": False, "H_K": 2, "H_V": 8},
]
ENDS: list[dict[str, Any]] = [
    {"kernel": "ends", "H_K": 2, "H_V": 8} | sizes for sizes in ({}, {"dtype": "fp16", "K": 64})
]
BETWEEN: list[dict[str, Any]] = [
    {"kernel": "between", "H_V": 8} | sizes for sizes in ({"initial": "bf16"}, {"K": 64, "V": 64})
]


def loop_source(
    dtype: str = "bf16", K: int = 128, V: int = 128, stages: int = 3, packed: bool = False, initial: str = "",
    final: bool = True, H_K: int = 16, H_V: int = 32, warpgroups: int = 1,
) -> Any:  # fmt: skip
    from triton_ssm.gdn._loop_kernel import gdn_loop_kernel_hopper

    pointers = {"o_ptr": f"*{dtype}"}
    pointers |= {"initial_ptr": f"*{initial}"} if initial else {}
    pointers |= {"final_ptr": "*fp32"} if final else {}
    pointers |= {"cu_seqlens_ptr": "*i32"} if packed else {}
    constants = {"H_K": H_K, "H_V": H_V, "K": K, "V": V, "WARPGROUPS": warpgroups, "STAGES": stages}
    return gluon_source(gdn_loop_kernel_hopper, tiles(dtype, K), pointers, constants)


def ends_source(dtype: str = "bf16", K: int = 128, V: int = 128, H_K: int = 16, H_V: int = 32) -> Any:
    from triton_ssm.gdn._ends_kernel import gdn_ends_kernel_hopper
    from triton_ssm.gdn._segments import _STAGES

    constants = {"H_K": H_K, "H_V": H_V, "K": K, "V": V, "STAGES": _STAGES}
    return gluon_source(gdn_ends_kernel_hopper, tiles(dtype, K), {"ends_ptr": "*fp32"}, constants)


def between_source(K: int = 128, V: int = 128, H_V: int = 32, initial: str = "") -> Any:
    from triton_ssm.gdn import _segments
    from triton_ssm.gdn._between_kernel import gdn_between_kernel

    pointers = {"ends_ptr": "*fp32", "states_ptr": "*fp32"} | ({"initial_ptr": f"*{initial}"} if initial else {})
    sizes = {"BLOCK_SIZE_V": _segments._BLOCK_SIZE_V, "STAGES": _segments._AHEAD}
    return _source(gdn_between_kernel, pointers, {"H_V": H_V, "K": K, "V": V} | sizes)


def tiles(dtype: str, K: int) -> dict[str, Any]:
    """Descriptors, of which no kernel here has all."""
    from triton.experimental.gluon import language as gl

    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]
    tile = {
        width: (dtype, (64, width), gl.NVMMASharedLayout.get_default_for([64, width], element)) for width in (64, K)
    }
    row = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    layouts = {f"{name}_desc": tile[K] for name in "qkY"} | {f"{name}_desc": tile[64] for name in ("v", "PX", "o")}
    return layouts | {"gates_desc": ("fp32", (2, 128), row)}


def compiled_row(variant: dict[str, Any]) -> dict[str, Any]:
    import triton

    from triton_ssm.gdn._segments import _WARPS

    variant = dict(variant)
    kernel = variant.pop("kernel", "loop")
    sources = {"loop": loop_source, "ends": ends_source, "between": between_source}
    options = {"num_warps": _WARPS if kernel == "between" else 4}
    compiled = triton.compile(sources[kernel](**variant), target=TARGETS["sm_90"], options=options)
    sass = machine_code(compiled.asm["cubin"])
    if kernel == "between":
        return {**variant, **resources(compiled), "tf32": len(re.findall(r"mma\.sync.*tf32", compiled.asm["ptx"]))}
    return {
        **variant,
        **resources(compiled),
        "said": serialised(compiled.asm["ptx"]),
        # Where each goes: ptxas has dropped products that were in flight over a loop's edge, and their sum went nowhere.
        "products": re.findall(r"\bHGMMA\.\S+ (\w+),", sass),
        "hazards": hazards(sass),
    }


def hazards(sass: str) -> list[str]:
    """Instructions that touch registers which products in flight use: those that write the left operand, and any that know
    the sum. From the first product to the last wait, which is the body of the loop."""
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?) *;", sass)
    first = next(i for i, text in enumerate(instructions) if "HGMMA" in text)
    last = max(i for i, text in enumerate(instructions) if "WARPGROUP.DEPBAR" in text)
    found: list[str] = []
    groups: list[list[tuple[set[int], set[int]]]] = [[]]  # of (left operand, sum); the last one is not closed yet
    for text in instructions[first : last + 1]:
        product = re.search(r"HGMMA\.64x(\d+)x16\S* R(\d+), R(\d+), ", text)
        waits = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", text)
        if product:
            width, sums, left = map(int, product.groups())
            groups[-1].append((set(range(left, left + 4)), set(range(sums, sums + width // 2))))
            if "gsb0" in text:
                groups.append([])
        elif waits:
            assert not groups[-1], f"a wait within a group of products: {text}"
            closed = groups[:-1]
            groups = [*closed[max(len(closed) - int(waits[1]), 0) :], []]
        else:
            read, written = _registers(text)
            pairs = (pair for group in groups for pair in group)
            if any(written & left or (read | written) & sums for left, sums in pairs):
                found.append(text)
    assert groups == [[]], "products in flight after the last wait"
    return found


def _registers(instruction: str) -> tuple[set[int], set[int]]:
    """(read, written), as far as it matters: all that are named, and with them the rest of the first one's."""
    name, _, operands = re.sub(r"^@!?\w+ ", "", instruction).partition(" ")
    named = [int(number) for number in re.findall(r"\bR(\d+)", operands)]
    if not named or name.startswith(("ST", "SYNCS", "RED")):
        return set(named), set()
    wide = 4 if ".128" in name or name.endswith(".4") else 2 if re.search(r"\.64|WIDE|CS2R", name) else 1
    return set(named[1:]), set(range(named[0], named[0] + wide))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    found = rows_apart(__name__, VARIANTS + ENDS + BETWEEN)
    assert len(found) == len(VARIANTS + ENDS + BETWEEN)
    return found


@pytest.mark.timeout(600)
def test_the_loop_compiles_for_hopper(rows):
    for row in rows[: len(VARIANTS)]:
        assert not row["hazards"], row
        warpgroups = row.get("warpgroups", 1)
        assert row["local"] <= (SLACK if warpgroups == 2 else 0) and not row["said"], row
        assert row["shared"] <= SHARED_LIMIT["sm_90"], row
        # h·k and h·q of K/16 steps each, r·PX and r·Y of a chunk's 64 tokens.
        steps = 2 * row.get("K", 128) // 16 + 2 * 64 // 16
        assert len(row["products"]) == warpgroups * steps and "RZ" not in row["products"], row


@pytest.mark.timeout(600)
def test_the_kernels_of_segments_compile_for_hopper(rows):
    rows = rows[len(VARIANTS) :]
    assert not any(row["local"] or row["shared"] > SHARED_LIMIT["sm_90"] for row in rows), rows
    for row in rows[: len(ENDS)]:
        assert not row["hazards"] and not row["said"], row
        # h·k of K/16 steps, and r·Y.
        assert len(row["products"]) == row.get("K", 128) // 16 + 64 // 16 and "RZ" not in row["products"], row
    for row in rows[len(ENDS) :]:
        K = row.get("K", 128)
        # Three products of tf32, each of 8 columns of T by 8 rows; a warp has an eighth of the columns.
        assert row["tf32"] == 3 * (K // 8) * (K // 8) // 8, row


PRODUCTS = """
    /*0000*/ HGMMA.64x64x16.F32.BF16 R24, R152, gdesc[UR16], RZ, !UPT ;
    /*0010*/ HGMMA.64x64x16.F32.BF16 R24, R156, gdesc[UR16], R24, gsb0 ;
    /*0020*/ HGMMA.64x128x16.F32.BF16 R56, R160, gdesc[UR16].tnspB, R56, gsb0 ;
    /*0030*/ {} ;
    /*0040*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
    /*0050*/ {} ;
    /*0060*/ @P1 BRA 0x70 ;
    /*0070*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
"""
NOTHING = "FADD R200, R201, R202"


@pytest.mark.parametrize(
    ("early", "late", "seen"),
    [
        (NOTHING, NOTHING, 0), (NOTHING, "FADD R24, R55, R152", 0), ("FADD R200, R152, R163", NOTHING, 0),
        ("FADD R200, R24, R202", NOTHING, 1), ("STS [R200], R55", NOTHING, 1), ("F2FP.BF16.PACK_AB R159, R1, R2", NOTHING, 1),
        ("LDS.128 R149, [R3]", NOTHING, 1), ("STS [R200], R152", NOTHING, 0), (NOTHING, "@P0 FMUL R119, R119, R3", 1),
        (NOTHING, "LDSM.16.MT88.4 R160, [R3]", 1), (NOTHING, "FADD R200, R120, R202", 0),
    ],
)  # fmt: skip
def test_a_register_that_is_still_read_is_seen(early, late, seen):
    """The gate itself."""
    assert len(hazards(PRODUCTS.format(early, late))) == seen


if __name__ == "__main__":
    print(json.dumps([compiled_row(variant) for variant in json.load(sys.stdin)]))
