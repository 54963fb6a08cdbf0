"""The fused scan's kernels compile for the H200 without a GPU: registers, spills, shared memory, nothing copied beside them."""

import pytest

from .test_pallas_gates import compile_rows

SHARED_LIMIT = 232_448
# Whole warpgroups of one block share 65,536 registers: three have 168 each, four 128; the end states' two take what they need.
MAX_REGISTERS = 216
# Block-wide numbers (which tokens, where) that wait for their warpgroup's turn; nothing of a loop over chunks.
MAX_SPILLED = 192

WHOLE = 65536
BASE = {
    "op": "mamba_chunk_scan_combined",
    "P": 64,
    "N": 128,
    "dtype": "bfloat16",
    "CHUNKS_PER_PIECE": WHOLE,
    "num_stages": 4,
}
ROWS = [
    {},
    {"dtype": "float16", "H": 16, "G": 1, "CHUNKS_PER_PIECE": 16},
    {"B": 2, "T": 1000, "N": 64, "initial": True, "intermediate": True},
    {"sequences": 8, "initial": True, "CHUNKS_PER_PIECE": 32, "intermediate": True},
    {"sequences": 3, "chunk_aligned": True, "z": True},
    {"P": 80, "H": 32, "z": True, "CHUNKS_PER_PIECE": 32},
    {"N": 256, "H": 48, "G": 1, "CHUNKS_PER_PIECE": 32},
    {"P": 128, "N": 256, "H": 32, "G": 2, "sequences": 2, "z": True, "initial": True},
]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return compile_rows("sm_90a", [BASE | row for row in ROWS])


@pytest.mark.parametrize("i", range(len(ROWS)), ids=[str(row) for row in ROWS])
def test_resources(i: int, compiled: list[dict]):
    row = compiled[i]
    assert row["registers"] <= MAX_REGISTERS, row
    assert row["spill_bytes"] <= MAX_SPILLED, row
    assert row["shared_bytes"] <= SHARED_LIMIT, row
    assert row["launched"]["num_stages"] in (2, 4), row


def test_the_plain_call_spills_nothing(compiled: list[dict]):
    assert (compiled[0]["spill_bytes"], compiled[0]["stack_bytes"]) == (0, 0), compiled[0]
