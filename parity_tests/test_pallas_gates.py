"""The Mosaic GPU kernel compiles for its devices without a GPU: registers, spills, shared memory, no copy of the state."""

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from ssm_configs import SPECS, Device, architecture, read_table, shipped_tables

OP = "selective_state_update"
STATE_DTYPES = {"float32": ("float32",), "float16": ("float16", "bfloat16")}
# Shared memory that one block may have, by NVIDIA's programming guide.
SHARED_LIMIT = {"sm_90a": 232_448, "sm_100a": 232_448, "sm_120a": 101_376}
# ptxas keeps 8 bytes there for every kernel that waits for TMA, however few registers it has; they are no spill.
STATED_STACK = {"sm_90a": 0, "sm_100a": 0, "sm_120a": 8}
MAX_REGISTERS = 255

# Every option once, and shapes off the beaten path, by what differs from BASE.
BASE = {"P": 64, "N": 128, "state_dtype": "float32", "BLOCK_SIZE_M": 16, "tiles_per_block": 2, "use_tma": True}
VARIANTS = [
    {"slots": False},
    {"untied": True, "z": True},
    {"dst": True, "padding": True},
    {"speculative": True},
    {"packed": True, "z": True},
    {"packed": True, "speculative": True, "dst": True, "padding": True, "use_tma": False},
    {"state_dtype": "bfloat16", "rounding": True},
    {"state_dtype": "float16", "rounding": True, "packed": True, "speculative": True},
    {"P": 16, "N": 32, "state_dtype": "bfloat16", "rounding": True},
    {"P": 80, "N": 96, "state_dtype": "bfloat16", "BLOCK_SIZE_M": 16, "use_tma": False},
    {"P": 80, "N": 128, "state_dtype": "float16", "BLOCK_SIZE_M": 80},
    {"P": 80, "N": 64, "BLOCK_SIZE_M": 80, "use_tma": False},
    {"P": 48, "N": 16, "dtype": "float32"},
    {"P": 16, "N": 16, "state_dtype": "float16", "rounding": True, "packed": True, "use_tma": False},
    {"P": 128, "N": 256, "BLOCK_SIZE_M": 64, "tiles_per_block": 2},
    {"P": 128, "N": 256, "BLOCK_SIZE_M": 64, "use_tma": False},
    {"S": 2100},  # more than 2^31 elements
    {"S": 2100, "use_tma": False},
]


@functools.cache
def rows_by_architecture() -> dict[str, list[dict]]:
    """Each distinct launch config of each architecture once; bfloat16 states read the float16 tables."""
    spec = SPECS[OP]
    rows: dict[str, dict[str, dict]] = {arch: {} for arch in SHARED_LIMIT}

    def add(arch: str, statics: dict, state_dtype: str, knobs: dict) -> None:
        row = {"P": statics["headdim"], "N": statics["dstate"], "state_dtype": state_dtype, **knobs}
        rows[arch][json.dumps(row)] = row

    for table in shipped_tables(OP):
        arch = f"{architecture(table.device_name)}a"
        if arch not in rows:  # another vendor's
            continue
        for entry in read_table(table.path, spec, table.statics).entries:
            knobs = spec.launch_knobs("pallas", entry.shared, entry.own.get("pallas"), table.statics)
            for state_dtype in STATE_DTYPES[table.dtype]:
                add(arch, table.statics, state_dtype, knobs)
    for arch, capability in (("sm_90a", (9, 0)), ("sm_100a", (10, 0)), ("sm_120a", (12, 0))):
        for P in (64, 80, 128):
            for N in (16, 64, 128, 256):
                statics = {"headdim": P, "dstate": N}
                shared = spec.heuristic(statics, "float32", Device("without a table", capability), 1024)
                add(arch, statics, "float32", spec.launch_knobs("pallas", shared, None, statics))
    return {arch: list(found.values()) for arch, found in rows.items()}


def compile_apart(*command: str, rows: Any) -> Any:
    """What Python, so called and given `rows`, prints last: compilers in a process of their own."""
    # Neither the interpreter's settings nor a table in the environment belong in there.
    unwanted = ("TRITON_INTERPRET", "SSM_TUNED_CONFIG_FOLDER", "VLLM_TUNED_CONFIG_FOLDER")
    done = subprocess.run(
        [sys.executable, *command], input=json.dumps(rows), capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name not in unwanted}
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def compile_rows(arch: str, rows: list[dict]) -> list[dict]:
    return compile_apart("-m", "parity_tests.gates_mosaic", "--arch", arch, "--rows", "-", rows=rows)


def check(arch: str, rows: list[dict]) -> list[dict]:
    results = compile_rows(arch, rows)
    assert len(results) == len(rows)
    check_results(arch, results)
    return results


def check_results(arch: str, results: list[dict]) -> None:
    for result in results:
        assert result["state_copies"] == 0, f"copies of the state: {result}"
        assert result["alias_bytes"] == result["state_bytes"], f"the state is not updated in place: {result}"
        if result.get("implementation") == "xla":
            continue
        assert result["spill_bytes"] == 0, f"spills: {result}"
        assert result["stack_bytes"] <= STATED_STACK[arch], f"local memory: {result}"
        assert 0 < result["registers"] <= MAX_REGISTERS, result
        assert result["shared_bytes"] <= SHARED_LIMIT[arch], f"too much shared memory: {result}"


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_option_and_a_sample_of_rows(arch: str):
    rows = rows_by_architecture()[arch]
    some = VARIANTS if arch == "sm_90a" else VARIANTS[1::6]
    results = check(arch, [BASE | row for row in some] + rows[:: max(1, len(rows) // 3)])
    # Decode as it is served must leave room for many blocks of an SM, which is what hides the memory's latency.
    assert all(result["registers"] <= 96 for result in results[-3:])


@pytest.mark.gates
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_row_and_option(arch: str):
    check(arch, [BASE | row for row in VARIANTS] + rows_by_architecture()[arch])


def test_xla_on_a_gpu_copies_no_donated_state():
    row = {"P": 64, "N": 128, "state_dtype": "float32", "implementation": "xla"}
    rounding = {"state_dtype": "float16", "rounding": True}
    check("sm_90a", [row, row | {"packed": True}, row | {"packed": True, "speculative": True}, row | rounding])


def test_a_copy_is_seen():
    """The gate itself: a state that is not donated has to be copied."""
    row = {"P": 64, "N": 128, "state_dtype": "float32"}
    (kept,) = compile_rows("sm_90a", [row | {"donate": False}])
    assert kept["state_copies"] == 1 and kept["alias_bytes"] == 0
    with pytest.raises(AssertionError, match="copies of the state"):
        check_results("sm_90a", [kept])
