"""The Mosaic GPU kernels of the chunked scan compile for the H200 without one: no spills, within shared memory."""

import pytest

from .gates_mosaic import SSD_STAGES
from .test_pallas_gates import MAX_REGISTERS, SHARED_LIMIT, compile_rows

FUSED = {"op": "mamba_chunk_scan_combined", "P": 64, "N": 128, "dtype": "bfloat16"}
NANO = {"P": 80, "N": 128}
# Every size that the fused kernel promises, and options, by what differs from FUSED; test_pallas_ssd_fused_gates.py has more.
ROWS = [
    {},
    {"CHUNKS_PER_PIECE": 32, "num_stages": 3},
    {"sequences": 4, "initial": True, "chunk_aligned": True, "dtype": "float16"},
    {"T": 8100, "z": True},
    {"sequences": 4, "z": True, "intermediate": True, "L": 256},
    {"P": 64, "N": 64, "H": 80, "G": 1},
    {"P": 64, "N": 256, "H": 48, "G": 1},
    {"P": 128, "N": 256, "H": 32, "G": 2, "sequences": 3, "initial": True},
    NANO,
    NANO | {"initial": True, "z": True},
]
# Bytes of a thread: all but the plainest calls keep numbers of the whole block there, outside the loop over chunks.
STATED_SPILL = 224
STAGES = [
    {"op": op, "T": T, "H": 16, "G": 2, "L": L, "dtype": dtype, **sizes}
    for op in SSD_STAGES
    for T, L, dtype, sizes in (
        (1024, 256, "bfloat16", {"P": 64, "N": 128, "sequences": 8}),
        (1000, 64, "float16", {"P": 64, "N": 64}),
        (1024, 128, "bfloat16", {"P": 128, "N": 256, "sequences": 3}),
    )
]


def check(rows: list[dict]) -> None:
    for result in compile_rows("sm_90a", rows):
        plain = result["op"].startswith("ssd.") or result.keys().isdisjoint(set().union(*ROWS) - FUSED.keys())
        stated = 0 if plain else STATED_SPILL
        assert result["spill_bytes"] <= stated and result["stack_bytes"] <= stated, f"spills: {result}"
        assert 0 < result["registers"] <= MAX_REGISTERS, result
        assert result["shared_bytes"] <= SHARED_LIMIT["sm_90a"], f"too much shared memory: {result}"


@pytest.mark.timeout(600)
def test_fused_scan():
    check([FUSED | row for row in ROWS])


@pytest.mark.timeout(600)
def test_stages():
    check(STAGES)
