"""`chunk_o`'s kernel for Hopper without a GPU: which calls it serves, and, compiled ahead of time, its registers, spills,
shared memory, and the products and copies that its machine code holds.

    python -m parity_tests.test_triton_gdn_chunk_o_gates

reads a JSON list of variants and prints one with an object a variant. A process of its own because the interpreter, once
chosen, replaces the compiler in the whole process.
"""

import ast
import dataclasses
import inspect
import json
import re
import sys
from typing import Any

import pytest
import torch

from ssm_configs.contracts.gdn import Dims

from .gates_apart import machine_code, rows_apart, serialised
from .test_triton_ssd_fused_compiled import gluon_source, only

# Registers of an SM over the threads of two programs.
_REGISTERS = 65_536 // 256
_SHARED_OF_SM = 233_472
# Key heads and value heads of a model, K and V.
_WIDE: dict[str, Any] = {"H_k": 16, "H_v": 32, "K": 128, "V": 128}
VARIANTS: list[dict[str, Any]] = [
    *(_WIDE | {"HEADS": heads, "num_stages": stages} for heads, stages in ((1, 1), (2, 1), (2, 2), (8, 3))),
    _WIDE | {"HEADS": 2, "num_stages": 2, "packed": True},
    _WIDE | {"HEADS": 2, "num_stages": 2, "packed": True, "v_first": True, "base_2": True, "dtype": "fp16"},
    _WIDE | {"HEADS": 2, "num_stages": 2, "gates": False},
    # more heads than the kernel is unrolled for, and a number that is no power of two
    {"H_k": 1, "H_v": 8, "K": 128, "V": 128, "HEADS": 8, "num_stages": 3, "packed": True},
    {"H_k": 1, "H_v": 3, "K": 64, "V": 128, "HEADS": 4, "num_stages": 2},
    {"H_k": 1, "H_v": 3, "K": 128, "V": 64, "HEADS": 4, "num_stages": 1, "v_first": True},
    {"H_k": 4, "H_v": 8, "K": 64, "V": 64, "HEADS": 2, "num_stages": 2, "packed": True},
]


def source(
    H_k: int, H_v: int, K: int, V: int, heads: int, stages: int, dtype: str = "bf16", packed: bool = False,
    gates: bool = True, base_2: bool = False, v_first: bool = False,
) -> Any:  # fmt: skip
    from triton.experimental.gluon import language as gl

    from triton_ssm.gdn._chunk_o_gluon_kernel import chunk_o_kernel_hopper as kernel

    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]

    def tile(*block: int) -> tuple:
        return dtype, block, gl.NVMMASharedLayout.get_default_for(list(block), element)

    layouts = {"q_desc": tile(64, K), "k_desc": tile(64, K), "v_desc": tile(64, 64), "o_desc": tile(64, 64)}
    layouts["h_desc"] = tile(64, K) if v_first else tile(K, 64)
    pointers = {"o_ptr": f"*{dtype}"}
    pointers |= {"g_ptr": "*fp32"} if gates else {}
    pointers |= {"cu_seqlens_ptr": "*i32"} if packed else {}
    constants = {
        "H_K": H_k, "H_V": H_v, "K": K, "V": V, "BASE_2": base_2, "V_FIRST": v_first, "HEADS": heads, "STAGES": stages,
    }  # fmt: skip
    built = gluon_source(kernel, only(kernel, layouts), pointers, constants)
    built.signature["scale"] = "fp32"
    built.attrs.pop((kernel.arg_names.index("scale"),), None)
    return built


def compiled_row(variant: dict[str, Any]) -> dict[str, Any]:
    import triton

    from triton_ssm.gdn._chunk_o_gluon import heads_and_stages

    from .gates_triton import TARGETS, resources

    given = dict(variant)
    H_k, H_v, K, V = (given[name] for name in ("H_k", "H_v", "K", "V"))
    dims = Dims(1, 8192, H_k, H_v, K, V, 64, 128, 1, given.get("packed", False))
    heads, stages = heads_and_stages(dims, given.pop("HEADS"), given.pop("num_stages"))
    compiled = triton.compile(
        source(**given, heads=heads, stages=stages), target=TARGETS["sm_90"], options={"num_warps": 4}
    )
    sass = machine_code(compiled.asm["cubin"])
    products = re.findall(r"\bHGMMA\.\S+ (\w+)", sass)
    return {
        **variant, "heads": heads, "stages": stages, **resources(compiled), "products": len(products),
        # ptxas drops what nobody reads by a result to nowhere.
        "nowhere": products.count("RZ"), "said": serialised(compiled.asm["ptx"]),
        "loads": len(re.findall(r"\bUTMALDG\b", sass)), "stores": len(re.findall(r"\bUTMASTG\b", sass)),
    }  # fmt: skip


@pytest.mark.timeout(300)
def test_the_hopper_kernel_compiles():
    from .gates_triton import SHARED_LIMIT

    rows = rows_apart(__name__, VARIANTS)
    assert len(rows) == len(VARIANTS)
    for row in rows:
        assert row["local"] == 0 and not row["said"] and not row["nowhere"], row
        # Two programs share an SM, whose system takes a kilobyte for each.
        assert row["registers"] <= _REGISTERS and row["shared"] <= SHARED_LIMIT["sm_90"], row
        assert 2 * (row["shared"] + 1024) <= _SHARED_OF_SM, row
        units = row["heads"] * row["V"] // 64
        # 16 elements a product: q and k once, then q and h, P and v for every unit.
        assert row["products"] == row["K"] // 16 + units * (row["K"] // 16 + 4), row
        # q, k, every unit's v and h, and its output.
        assert row["loads"] == 2 + 2 * units and row["stores"] == units, row
    assert {row["HEADS"]: row["heads"] for row in rows if row["H_v"] == 8 and row["H_k"] == 1} == {8: 4}
    assert {row["heads"] for row in rows if row["H_v"] == 3} == {3}


@dataclasses.dataclass(frozen=True)
class Pointer:
    """All that is asked of a tensor."""

    dtype: torch.dtype = torch.bfloat16
    address: int = 1024
    place: str = "cuda"

    @property
    def device(self) -> torch.device:
        return torch.device(self.place, 0)

    def data_ptr(self) -> int:
        return self.address


DIMS = Dims(2, 150, 2, 4, 128, 128, 64, 3, 2, False)
STRIDES = {"q": (160 * 1024, 1024), "k": (150 * 256, 256), "v": (0, 512)}


@pytest.mark.parametrize(
    "dims, strides, tensors, expected",
    [
        ({}, {}, {}, True),
        ({"B": 1, "NC": 5, "packed": True, "K": 64, "V": 64}, {}, {}, True),
        ({}, {}, {"h": Pointer(torch.float32)}, False),
        ({}, {}, dict.fromkeys("qkvho", Pointer(torch.float32)), False),
        ({}, {}, dict.fromkeys("qkvho", Pointer(place="cpu")), False),
        *(({}, {}, {name: Pointer(address=1032)}, False) for name in "qkvho"),
        ({"L": 32}, {}, {}, False),
        ({"K": 96}, {}, {}, False),
        ({"V": 256}, {}, {}, False),
        ({"B": 1, "NC": 0, "packed": True}, {}, {}, False),
        ({}, {"q": (160 * 1028, 1028)}, {}, False),  # tokens that begin at multiples of 8 bytes
        ({}, {"k": (150 * 256 + 128, 256)}, {}, False),  # no whole number of tokens from batch row to batch row
        ({}, {"v": (512, 1024)}, {}, False),  # batch rows between tokens
        ({}, {"v": (0, 0)}, {}, False),
        ({"NC": 2**22}, {}, {}, False),
        ({}, {"q": (2**41, 1024)}, {}, False),
    ],
)
def test_which_calls_it_serves(dims, strides, tensors, expected, monkeypatch: pytest.MonkeyPatch):
    import triton.knobs

    from triton_ssm.gdn import _chunk_o_gluon
    from triton_ssm.ssd import _fused_gluon

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(_fused_gluon, "_is_hopper", lambda index: True)
    given = [tensors.get(name, Pointer()) for name in "qkvho"]
    sizes = dataclasses.replace(DIMS, **dims)
    assert _chunk_o_gluon.serves(sizes, STRIDES | strides, *given) is expected
    monkeypatch.setattr(_fused_gluon, "_is_hopper", lambda index: False)
    assert not _chunk_o_gluon.serves(sizes, STRIDES | strides, *given)


def test_no_size_keys_a_compile():
    from triton_ssm.gdn._chunk_o_gluon_kernel import chunk_o_kernel_hopper as kernel

    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    tensors = {name for name in kernel.arg_names if name.endswith(("_ptr", "_desc"))}
    unspecialised = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    assert set(kernel.arg_names) - constants - tensors - unspecialised == {"scale"}
    (definition,) = ast.parse(inspect.getsource(kernel.fn)).body
    read = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}
    assert set(kernel.arg_names) <= read, f"never read: {set(kernel.arg_names) - read}"


if __name__ == "__main__":
    print(json.dumps([compiled_row(variant) for variant in json.load(sys.stdin)]))
