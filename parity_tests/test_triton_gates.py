"""Every row of every shipped table compiles for its architecture, within its shared memory, and spills no more than stated."""

import json
import subprocess
import sys
from collections import defaultdict

import pytest

from ssm_configs import SPECS, Device, architecture, lookup, read_table, shipped_tables

from .gates_triton import SHARED_LIMIT

OP = "selective_state_update"
STATE_DTYPES = {"float32": ("float32",), "float16": ("float16", "bfloat16")}
# Bytes of local memory a thread, where a row of a table that others measured asks for more registers than there are.
STATED_SPILLS: dict[tuple[str, str, int, int], int] = {}


def rows_by_architecture() -> dict[str, list[dict]]:
    """Each distinct launch config of each architecture once; bfloat16 states read the float16 tables."""
    rows: dict[str, dict[str, dict]] = defaultdict(dict)

    def add(arch: str, P: int, N: int, dtype: str, BLOCK_SIZE_M: int, num_warps: int) -> None:
        row = {"P": P, "N": N, "state_dtype": dtype, "BLOCK_SIZE_M": BLOCK_SIZE_M, "num_warps": num_warps}
        rows[arch][json.dumps(row)] = row

    for table in shipped_tables(OP):
        arch = architecture(table.device_name)
        if arch is None:  # Intel: no compiler here, so these tables are load-checked only
            continue
        P, N = table.statics["headdim"], table.statics["dstate"]
        for entry in read_table(table.path, SPECS[OP], table.statics).entries:
            for dtype in STATE_DTYPES[table.dtype]:
                add(arch, P, N, dtype, entry.shared["BLOCK_SIZE_M"], entry.shared["num_warps"])
    for P in (64, 80):
        for N in (16, 64, 128, 256):
            config = lookup(
                OP, twin="triton", device=Device("NVIDIA A100", (8, 0)), dtype="float32", size=1024, headdim=P, dstate=N
            )
            add("sm_80", P, N, "float32", config["BLOCK_SIZE_M"], config["num_warps"])
    return {arch: list(found.values()) for arch, found in sorted(rows.items())}


def compile_rows(arch: str, rows: list[dict]) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-m", "parity_tests.gates_triton", "--arch", arch, "--rows", "-"],
        input=json.dumps(rows), capture_output=True, text=True, env=_without_interpreter(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def _without_interpreter() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def check(arch: str, rows: list[dict]) -> None:
    results = compile_rows(arch, rows)
    assert len(results) == len(rows)
    for result in results:
        stated = STATED_SPILLS.get((arch, result["state_dtype"], result["BLOCK_SIZE_M"], result["num_warps"]), 0)
        assert result["local"] <= stated, f"spills: {result}"
        assert result["shared"] <= SHARED_LIMIT[arch], f"too much shared memory: {result}"
        assert result["registers"] > 0, result


ROWS = rows_by_architecture()


def test_every_compilable_architecture_has_rows():
    assert set(ROWS) == set(SHARED_LIMIT)


@pytest.mark.parametrize("arch", ROWS)
@pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")
def test_a_sample_of_rows(arch: str):
    rows = ROWS[arch]
    sample = rows[:: max(1, len(rows) // 3)]
    rounding = [row | {"rounding": True} for row in sample if row["state_dtype"] != "float32"][:1]
    check(arch, sample + rounding)


@pytest.mark.gates
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", ROWS)
def test_every_row(arch: str):
    check(arch, ROWS[arch])


def test_a_spill_is_seen():
    """The gate itself: a tile far too large for its threads must be caught."""
    (result,) = compile_rows(
        "sm_90", [{"P": 64, "N": 256, "state_dtype": "float32", "BLOCK_SIZE_M": 64, "num_warps": 1}]
    )
    assert result["local"] > 0
