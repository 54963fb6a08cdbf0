"""Every row of every shipped table compiles for its architecture, within its shared memory, and spills no more than stated."""

import json
from collections import defaultdict
from collections.abc import Mapping

import pytest

from ssm_configs import SPECS, Device, architecture, lookup, read_table, shipped_tables

from .gates_apart import rows_apart
from .gates_triton import SHARED_LIMIT, SOURCES

# Bytes of a thread: one 64-bit address that is read once, from L1.
MOST_SPILLED = 8
SIXTEEN_BITS = {"float32": ("float32",), "float16": ("float16", "bfloat16")}


def rows_by_architecture() -> dict[str, list[dict]]:
    """Each distinct launch config of each architecture once; bfloat16 reads the float16 tables."""
    rows: dict[str, dict[str, dict]] = defaultdict(dict)

    def add(arch: str, op: str, statics: Mapping[str, int], dtype: str, knobs: Mapping[str, int]) -> None:
        if op == "selective_state_update":
            row = {"P": statics["headdim"], "N": statics["dstate"], "state_dtype": dtype}
        else:
            row = {"W": statics["width"], "dtype": dtype}
        row = {"arch": arch, "op": op, **row, **knobs}
        rows[arch][json.dumps(row)] = row

    for op in SOURCES:
        for table in shipped_tables(op):
            arch = architecture(table.device_name)
            if arch is None:  # Intel: no compiler here, so these tables are load-checked only
                continue
            for entry in read_table(table.path, SPECS[op], table.statics).entries:
                for dtype in SIXTEEN_BITS[table.dtype]:
                    add(arch, op, table.statics, dtype, entry.shared)
    statics = [{"headdim": P, "dstate": N} for P in (64, 80) for N in (16, 64, 128, 256)]
    for op, sizes in {
        "selective_state_update": statics,
        "causal_conv1d": [{"width": W} for W in (2, 3, 4, 5, 6)],
        "causal_conv1d_update": [{"width": W} for W in (2, 3, 4, 5, 6)],
    }.items():
        for static in sizes:
            config = lookup(
                op, twin="triton", device=Device("NVIDIA A100", (8, 0)), dtype="float32", size=2**20, **static
            )
            add("sm_80", op, static, "float32", config.knobs)
    return {arch: list(found.values()) for arch, found in sorted(rows.items())}


def compile_rows(rows: list[dict]) -> list[dict]:
    return rows_apart("parity_tests.gates_triton", rows)


def check(rows: list[dict]) -> None:
    results = compile_rows(rows)
    assert len(results) == len(rows)
    for result in results:
        assert result["local"] <= MOST_SPILLED, f"spills: {result}"
        assert result["shared"] <= SHARED_LIMIT[result["arch"]], f"too much shared memory: {result}"
        assert result["registers"] > 0, result


ROWS = rows_by_architecture()
# What no table row asks for: stochastic rounding, a split in aligned chunks, speculative decode, every width.
VARIANTS = [
    {"op": "selective_state_update", "P": 64, "N": 128, "state_dtype": "bfloat16", "BLOCK_SIZE_M": 16, "num_warps": 2,
     "rounding": True},
    {"op": "causal_conv1d", "W": 4, "dtype": "bfloat16", "BLOCK_SIZE_T": 32, "BLOCK_SIZE_D": 256, "num_warps": 2,
     "split": True},
    {"op": "causal_conv1d_update", "W": 4, "dtype": "bfloat16", "BLOCK_SIZE_D": 256, "BLOCK_SIZE_B": 1, "num_warps": 2,
     "speculative": True},
    *({"op": "causal_conv1d", "W": W, "dtype": "float32", "BLOCK_SIZE_T": 32, "BLOCK_SIZE_D": 256, "num_warps": 2}
      for W in (2, 3, 5, 6)),
    *({"op": "causal_conv1d_update", "W": W, "dtype": "float16", "BLOCK_SIZE_D": 256, "BLOCK_SIZE_B": 2, "num_warps": 2}
      for W in (2, 3, 5, 6)),
]  # fmt: skip


def test_every_compilable_architecture_has_rows():
    assert set(ROWS) == set(SHARED_LIMIT)


@pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")
def test_a_sample_of_rows():
    rows = []
    for arch, those in ROWS.items():
        rows += those[:: max(1, len(those) // 3)] + [{"arch": arch} | row for row in VARIANTS]
    check(rows)


@pytest.mark.gates
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", ROWS)
def test_every_row(arch: str):
    check(ROWS[arch])


def test_a_spill_is_seen():
    """The gate itself: a tile far too large for its threads must be caught."""
    (result,) = compile_rows(
        [
            {
                "arch": "sm_90",
                "op": "selective_state_update",
                "P": 64,
                "N": 256,
                "state_dtype": "float32",
                "BLOCK_SIZE_M": 64,
                "num_warps": 1,
            }
        ],
    )
    assert result["local"] > 0
