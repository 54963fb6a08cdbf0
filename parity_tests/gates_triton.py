"""Compiles Triton kernels ahead of time, for any architecture and without a GPU, and reports what they use.

    python -m parity_tests.gates_triton < rows.json

A row: {"arch": "sm_90", "op": "causal_conv1d", "W": 4, "dtype": "bfloat16", …}. This prints a JSON list, one object a row:
registers, local memory (spills and stack), shared memory. A process of its own because the interpreter, once chosen,
replaces the compiler in the whole process; and one for all architectures, because it takes seconds to start.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_ssm._causal_conv1d_kernel import causal_conv1d_kernel
from triton_ssm._causal_conv1d_update_kernel import causal_conv1d_update_kernel
from triton_ssm._selective_state_update_kernel import selective_state_update_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# Shared memory that one block may have, by the vendors' programming guides; the compiler does not check it.
SHARED_LIMIT = {
    "sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536, "gfx950": 163_840,
}  # fmt: skip
_SHORT = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def selective_state_update_source(
    P: int, N: int, state_dtype: str, BLOCK_SIZE_M: int, rounding: bool = False
) -> ASTSource:
    """The variant that serving runs: tied dt and A, D, dt_bias, softplus, slots; x in bfloat16, Nemotron-H's groups."""
    pointers = {
        "state_ptr": _SHORT[state_dtype], "x_ptr": "*bf16", "dt_ptr": "*bf16", "A_ptr": "*fp32", "B_ptr": "*bf16",
        "C_ptr": "*bf16", "D_ptr": "*fp32", "dt_bias_ptr": "*fp32", "y_ptr": "*bf16", "source_ptr": "*i32",
    }  # fmt: skip
    if rounding:
        pointers["seed_ptr"] = "*i64"
    constants = {
        "H": 128, "G": 8, "P": P, "N": N, "T_MAX": 1, "TIED_DT": True, "TIED_DT_BIAS": True, "TIED_A": True,
        "TIED_D": True, "DT_SOFTPLUS": True, "BLOCK_SIZE_M": BLOCK_SIZE_M,
        "BLOCK_SIZE_N": max(8, triton.next_power_of_2(N)),
    }  # fmt: skip
    return _source(selective_state_update_kernel, pointers, constants)


def causal_conv1d_source(W: int, dtype: str, BLOCK_SIZE_T: int, BLOCK_SIZE_D: int, split: bool = False) -> ASTSource:
    """Nemotron-H-8B's 10240 channels, packed, with a pool, bias and SiLU; `split` into x, B and C in aligned chunks."""
    short = _SHORT[dtype]
    pointers = {
        "x_ptr": short, "weight_ptr": short, "bias_ptr": short, "y0_ptr": short, "cu_seqlens_ptr": "*i32",
        "history_ptr": short, "final_ptr": short, "slots_ptr": "*i32", "has_history_ptr": "*i1",
    }  # fmt: skip
    if split:
        pointers |= {"y1_ptr": short, "y2_ptr": short}
    sizes = (8192, 1024, 1024, 0) if split else (10240, 0, 0, 0)
    constants = {f"SIZE_{i}": size for i, size in enumerate(sizes)} | {
        "W": W, "SILU": True, "CHUNK": 128 if split else 0, "BLOCK_SIZE_T": BLOCK_SIZE_T, "BLOCK_SIZE_D": BLOCK_SIZE_D,
    }  # fmt: skip
    return _source(causal_conv1d_kernel, pointers, constants)


def causal_conv1d_update_source(
    W: int, dtype: str, BLOCK_SIZE_D: int, BLOCK_SIZE_B: int, speculative: bool = False
) -> ASTSource:
    """Nemotron-H-8B's 10240 channels, slots, bias and SiLU; packed where `speculative`."""
    short = _SHORT[dtype]
    pointers = {
        "x_ptr": short, "state_ptr": short, "weight_ptr": short, "bias_ptr": short, "y_ptr": short, "slots_ptr": "*i32",
    }  # fmt: skip
    if speculative:
        pointers |= {"cu_seqlens_ptr": "*i32", "accepted_ptr": "*i32"}
    constants = {
        "D": 10240, "L": W + 2 if speculative else W - 1, "W": W, "SILU": True,
        "BLOCK_SIZE_D": BLOCK_SIZE_D, "BLOCK_SIZE_B": BLOCK_SIZE_B,
    }  # fmt: skip
    return _source(causal_conv1d_update_kernel, pointers, constants)


SOURCES = {
    "selective_state_update": selective_state_update_source,
    "causal_conv1d": causal_conv1d_source,
    "causal_conv1d_update": causal_conv1d_update_source,
}


def _source(kernel, pointers: dict[str, str], constants: dict) -> ASTSource:
    """Pointers that are not named are None; whatever else is no constant is an integer."""
    constants = dict(constants)
    unspecialised = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants or (name.endswith("_ptr") and name not in pointers):
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        else:
            signature[name] = pointers.get(name, "i32")
            # Pointers and strides are multiples of 16, as the launcher would find.
            if name not in unspecialised and not name.endswith("_desc"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(compiled) -> dict[str, int]:
    """Registers a thread, local memory a thread (spills and stack) and shared memory a block, in bytes."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def field(name):
            (value,) = re.findall(rf"{name}:?\s+(\d+)", text)[:1]
            return int(value)

        return {"registers": field(r"\.vgpr_count"), "local": field(r"\.vgpr_spill_count"), "shared": shared}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+).*?STACK:(\d+).*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected a resource line, got {text!r}")
    return {"registers": int(found[1]), "local": int(found[2]) + int(found[3]), "shared": shared}


def compile_row(row: dict) -> dict:
    arguments = dict(row)
    arch, op, num_warps = arguments.pop("arch"), arguments.pop("op"), arguments.pop("num_warps")
    compiled = triton.compile(SOURCES[op](**arguments), target=TARGETS[arch], options={"num_warps": num_warps})
    return {**row, **resources(compiled)}


if __name__ == "__main__":
    print(json.dumps([compile_row(row) for row in json.load(sys.stdin)]))
