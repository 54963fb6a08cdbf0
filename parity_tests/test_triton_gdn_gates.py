"""The gated delta rule's kernels, compiled ahead of time for every architecture without a GPU, at the sizes that models have.

    python -m parity_tests.test_triton_gdn_gates < rows.json

A row: {"arch": "sm_90", "kernel": "chunk_o", "dtype": "bfloat16", …}. This prints a JSON list, one object a row: registers,
local memory, shared memory, and how many products in a loop have a left operand in registers, which on sm_90 a pipelined
loop can overwrite too early.
"""

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from ssm_configs import Device, lookup

from .gates_apart import rows_apart

# The device whose heuristic a row launches with.
DEVICES = {
    "sm_80": Device("NVIDIA A100", (8, 0)), "sm_90": Device("NVIDIA H200", (9, 0)), "sm_100": Device("NVIDIA B200", (10, 0)),
    "sm_120": Device("NVIDIA RTX PRO 6000", (12, 0)), "gfx942": Device("AMD Instinct MI300X", None),
}  # fmt: skip
H_K, H_V = 16, 32
_SHORT = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def launch_config(op: str, arch: str, dtype: str, size: int, **statics: int) -> dict[str, Any]:
    return lookup(op, twin="triton", device=DEVICES[arch], dtype=dtype, size=size, **statics).knobs


def heuristic_rows(arch: str, K: int = 128, V: int = 128, L: int = 64, dtype: str = "bfloat16") -> list[dict[str, Any]]:
    """Every kernel with the config that it gets where there is no table, for few states and for many."""
    statics = {"K": K, "V": V, "chunk_size": L}
    common = {"arch": arch, "dtype": dtype, **statics}
    tokens, cumsum = 8192 * H_V, "gdn_chunk_local_cumsum"
    rows: list[dict[str, Any]] = [
        {"kernel": "chunk_local_cumsum", **common, **launch_config(cumsum, arch, dtype, tokens, chunk_size=L)},
        {"kernel": "chunk_scaled_dot_kkt", **common,
         **launch_config("gdn_chunk_scaled_dot_kkt", arch, dtype, tokens, K=K, chunk_size=L)},
        {"kernel": "solve_tril", **common, **launch_config("gdn_solve_tril", arch, "float32", tokens, chunk_size=L)},
        {"kernel": "recompute_w_u", **common, **launch_config("gdn_recompute_w_u", arch, dtype, tokens, **statics)},
        {"kernel": "chunk_o", **common, **launch_config("gdn_chunk_o", arch, dtype, tokens, **statics)},
        {"kernel": "l2norm", **common, "num_warps": 4},
    ]  # fmt: skip
    for states in (H_V, 8 * H_V):
        rows.append(
            {"kernel": "chunk_delta_h", **common, **launch_config("gdn_chunk_delta_h", arch, dtype, states, **statics)}
        )
        knobs = launch_config("chunk_gated_delta_rule", arch, dtype, states, **statics)
        rows.append({"kernel": "kkt_solve", **common, "num_warps": knobs["kkt_num_warps"]})
    for state_dtype in ("float32", "bfloat16"):
        knobs = launch_config("fused_recurrent_gated_delta_rule", arch, state_dtype, 64 * H_V, K=K, V=V)
        rows.append({"kernel": "recurrent", **common, "state_dtype": state_dtype, **knobs})
    return rows


def source(row: Mapping[str, Any]) -> Any:
    """What a row compiles: (kernel, pointers, constants)."""
    from triton_ssm.gdn._chunk_delta_h_kernel import chunk_delta_h_kernel
    from triton_ssm.gdn._chunk_local_cumsum_kernel import chunk_local_cumsum_kernel
    from triton_ssm.gdn._chunk_o_kernel import chunk_o_kernel
    from triton_ssm.gdn._chunk_scaled_dot_kkt_kernel import chunk_scaled_dot_kkt_kernel
    from triton_ssm.gdn._kkt_solve_kernel import kkt_solve_kernel
    from triton_ssm.gdn._l2norm_kernel import l2norm_kernel
    from triton_ssm.gdn._recompute_w_u_kernel import recompute_w_u_kernel
    from triton_ssm.gdn._recurrent_kernel import fused_recurrent_gated_delta_rule_kernel
    from triton_ssm.gdn._solve_tril_kernel import solve_tril_kernel

    x, fp32, bounds = _SHORT[row["dtype"]], "*fp32", {"cu_seqlens_ptr": "*i32"}
    K, V, L, name = row["K"], row["V"], row["chunk_size"], row["kernel"]
    heads, precision = {"H_K": H_K, "H_V": H_V}, {"PRECISION": "ieee"}

    def block(knob: str, of: int) -> dict[str, int]:
        return {knob: max(16, min(row[knob], 1 << (of - 1).bit_length()))}

    def pointers(names: str, kind: str) -> dict[str, str]:
        return {f"{name}_ptr": kind for name in names.split()}

    whole_K = {"BLOCK_SIZE_K": max(16, 1 << (K - 1).bit_length())}
    if name == "chunk_local_cumsum":
        knobs = {"BLOCK_SIZE_H": row["BLOCK_SIZE_H"]}
        return chunk_local_cumsum_kernel, pointers("g out", fp32) | bounds, {"H_V": H_V, "BT": L, **knobs}
    if name == "chunk_scaled_dot_kkt":
        constants = {**heads, "K": K, "BT": L, **precision, **block("BLOCK_SIZE_K", K)}
        return chunk_scaled_dot_kkt_kernel, pointers("k beta", x) | pointers("g A", fp32) | bounds, constants
    if name == "solve_tril":
        constants = {"H_V": H_V, "BT": L}
        if row.get("use_tma"):
            return (
                solve_tril_kernel,
                pointers("out", fp32) | bounds | {"A_desc": f"tensordesc<fp32[{L}, {L}]>"},
                constants,
            )
        return solve_tril_kernel, pointers("A out", fp32) | bounds, constants | {"A_desc": None}
    if name == "kkt_solve":
        given = pointers("k A", x) | pointers("g beta sums", fp32) | bounds
        width = {"BLOCK_SIZE_K": 16} if x == fp32 else whole_K
        return kkt_solve_kernel, given, {**heads, "K": K, "BT": L, **precision, **width}
    if name == "recompute_w_u":
        constants = {**heads, "K": K, "V": V, "BT": L, "ZERO_PADDING": False, **precision}
        constants |= block("BLOCK_SIZE_K", K) | block("BLOCK_SIZE_V", V)
        return recompute_w_u_kernel, pointers("k v A w u", x) | pointers("beta g", fp32) | bounds, constants
    if name == "chunk_delta_h":
        given = pointers("k w u h v_new", x) | bounds
        constants = {**heads, "K": K, "V": V, "BT": L, **precision, **whole_K, **block("BLOCK_SIZE_V", V)}
        return (
            chunk_delta_h_kernel,
            given | pointers("g initial final", fp32),
            constants | {"STAGES": row["num_stages"]},
        )
    if name == "chunk_o":
        constants = {
            **heads,
            "K": K,
            "V": V,
            "BT": L,
            "BASE_2": False,
            "V_FIRST": row.get("V_FIRST", False),
            **precision,
        }
        constants |= {"HEADS": row["HEADS"], **block("BLOCK_SIZE_K", K), **block("BLOCK_SIZE_V", V)}
        given = pointers("q k v o", x) | {"h_ptr": _SHORT[row.get("h_dtype", row["dtype"])], "g_ptr": fp32} | bounds
        return chunk_o_kernel, given, constants | {"STAGES": row["num_stages"]}
    if name == "l2norm":
        return l2norm_kernel, pointers("q k q_out k_out", x), {"H_K": H_K, "K": K, "BLOCK_SIZE_M": 16, **whole_K}
    state = _SHORT[row["state_dtype"]]
    given = pointers("q k v g beta o", x) | pointers("A_log dt_bias", fp32) | {"state_ptr": state, "source_ptr": "*i32"}
    constants = {**heads, "K": K, "V": V, "T_MAX": 1, "V_FIRST": row.get("V_FIRST", False), "L2NORM": True}
    constants |= {"SIGMOID_BETA": True, **whole_K, "BLOCK_SIZE_V": min(row["BLOCK_SIZE_V"], 1 << (V - 1).bit_length())}
    return fused_recurrent_gated_delta_rule_kernel, given, constants


def register_left_operands(ttgir: str) -> tuple[int, int]:
    """(asynchronous products, those of them within a loop whose left operand is in registers)."""
    loops: list[int] = []
    products = bad = 0
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        while loops and indent <= loops[-1]:
            loops.pop()
        if "scf.for" in line or "scf.while" in line:
            loops.append(indent)
        if "warp_group_dot " in line:
            products += 1
            bad += bool(loops) and re.search(r" : tensor<", line) is not None
    return products, bad


def compile_row(row: Mapping[str, Any]) -> dict[str, Any]:
    import triton

    from .gates_triton import TARGETS, _source, resources

    kernel, pointers, constants = source(row)
    built = _source(kernel, pointers, constants)
    if "scale" in kernel.arg_names:
        built.signature["scale"] = "fp32"
        built.attrs.pop((kernel.arg_names.index("scale"),), None)
    compiled = triton.compile(built, target=TARGETS[row["arch"]], options={"num_warps": row["num_warps"]})
    products, bad = register_left_operands(compiled.asm["ttgir"])
    return {**row, "products": products, "register_left": bad, **resources(compiled)}


def check(results: list[dict[str, Any]], spills: int = 0) -> None:
    from .gates_triton import SHARED_LIMIT

    for result in results:
        assert result["local"] <= spills, f"spills: {result}"
        assert result["shared"] <= SHARED_LIMIT[result["arch"]], f"too much shared memory: {result}"
        assert not result["register_left"], f"a left operand in registers, in a loop: {result}"


def compile_rows(*groups: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The results of each group, all of one process."""
    rows = [row for group in groups for row in group]
    results = rows_apart(__name__, rows)
    assert len(results) == len(rows)
    return [[results.pop(0) for _ in group] for group in groups]


pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


def rows_that_no_heuristic_asks_for() -> list[dict[str, Any]]:
    statics = {"arch": "sm_90", "K": 128, "V": 128, "chunk_size": 64, "dtype": "bfloat16"}
    o = {
        "kernel": "chunk_o",
        **statics,
        **launch_config("gdn_chunk_o", "sm_90", "bfloat16", 1, K=128, V=128, chunk_size=64),
    }
    h = {"kernel": "chunk_delta_h", **statics, "num_warps": 4, "BLOCK_SIZE_V": 32}
    solve = {"kernel": "solve_tril", **statics, "num_warps": 8, "use_tma": True}
    return [
        o | {"HEADS": 2, "num_stages": 2}, o | {"V_FIRST": True}, o | {"h_dtype": "float32"},
        o | {"HEADS": 4, "BLOCK_SIZE_V": 64, "num_stages": 3, "num_warps": 4},
        *(h | {"num_stages": stages} for stages in (2, 3)),
        {"kernel": "recurrent", **statics, "state_dtype": "float32", "V_FIRST": True, "BLOCK_SIZE_V": 8, "num_warps": 1},
        *(solve | {"chunk_size": L} for L in (16, 32, 64)),
    ]  # fmt: skip


# K, V, L
OTHER_SIZES = [(64, 64, 64), (256, 256, 64), (96, 192, 64), (128, 128, 16), (128, 128, 32)]
# fp32 split into tf32 has a left operand in registers.
BAD = {
    "arch": "sm_90", "kernel": "chunk_o", "K": 64, "V": 64, "chunk_size": 64, "dtype": "bfloat16", "h_dtype": "float32",
    "BLOCK_SIZE_K": 64, "BLOCK_SIZE_V": 64, "HEADS": 2, "num_warps": 4, "num_stages": 2,
}  # fmt: skip


@pytest.mark.timeout(600)
def test_on_an_h200():
    of_models, others, fp32, bad = compile_rows(
        heuristic_rows("sm_90"),
        [row for sizes in OTHER_SIZES for row in heuristic_rows("sm_90", *sizes)] + rows_that_no_heuristic_asks_for(),
        heuristic_rows("sm_90", dtype="float32"),
        [BAD],
    )
    check(of_models)
    on_tensor_cores = [result["kernel"] for result in of_models if result["products"]]
    # (`chunk_scaled_dot_kkt` is fastest with fewer warps than wgmma takes.)
    assert set(on_tensor_cores) == {"kkt_solve", "recompute_w_u", "chunk_delta_h", "chunk_o"}
    check(others)
    # Its products hold operands in registers: it may spill, but not by hundreds of numbers.
    check(fp32, spills=400)
    # The gate itself.
    assert bad[0]["register_left"] == 1


@pytest.mark.timeout(600)
def test_models_sizes_elsewhere():
    (results,) = compile_rows([row for arch in DEVICES if arch != "sm_90" for row in heuristic_rows(arch)])
    check(results, spills=200)


if __name__ == "__main__":
    print(json.dumps([compile_row(row) for row in json.load(sys.stdin)]))
