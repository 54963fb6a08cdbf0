"""The fused scan's kernels compile for the H200 without a GPU: registers, spills, shared memory, nothing copied beside them."""

import pytest

from pallas_ssm.ssd._fused_pieces import CHUNK

from .test_pallas_gates import compile_rows

SHARED_LIMIT = 232_448
# Whole warpgroups of one block share 65,536 registers: three have 168 each, four 128; the end states' two take what they need.
MAX_REGISTERS = 216
# Bytes of a thread in local memory. One head a block: next to nothing. Two: the feeding warpgroup has 64 registers. Ends of
# pieces of wide states: the state alone takes 128 of the registers with which two blocks share an SM.
MAX_SPILLED, MAX_SPILLED_OF_TWO, MAX_SPILLED_OF_ENDS = 8, 96, 192

CALL = {"op": "mamba_chunk_scan_combined", "P": 64, "N": 128, "dtype": "bfloat16"}
WHOLE = {"CHUNKS_PER_PIECE": 65536, "num_stages": 4}
# Every size that the fused kernel promises, and every option. First with the launches that calls get, then with others.
LAUNCHED = [
    {},
    {"sequences": 4, "initial": True, "chunk_aligned": True, "dtype": "float16"},
    {"T": 8100, "z": True},
    {"sequences": 4, "z": True, "intermediate": True, "L": 256},
    {"N": 256, "H": 48, "G": 1},
    {"P": 128, "N": 256, "H": 32, "G": 2, "sequences": 3, "initial": True},
    {"P": 80},
]
PINNED = [
    {"CHUNKS_PER_PIECE": 32, "num_stages": 3},
    {"dtype": "float16", "H": 16, "G": 1, "CHUNKS_PER_PIECE": 16},
    {"B": 2, "T": 1000, "N": 64, "initial": True, "intermediate": True},
    {"sequences": 8, "initial": True, "CHUNKS_PER_PIECE": 32, "intermediate": True},
    {"sequences": 3, "chunk_aligned": True, "z": True},
    {"P": 80, "H": 32, "z": True, "initial": True, "CHUNKS_PER_PIECE": 32},
    {"P": 128, "N": 256, "H": 32, "G": 2, "sequences": 2, "z": True, "initial": True},
]
TWO_HEADS = [
    {"H": 80, "G": 1},
    {"dtype": "float16", "H": 16, "G": 1, "CHUNKS_PER_PIECE": 16, "STATES_PER_PIECE": 2, "N": 64},
    {"sequences": 8, "initial": True, "CHUNKS_PER_PIECE": 32, "intermediate": True, "z": True},
    {"P": 80, "sequences": 4, "initial": True, "chunk_aligned": True, "z": True},
]
ROWS = [
    *(CALL | row for row in LAUNCHED),
    *(CALL | WHOLE | row for row in PINNED),
    *(CALL | WHOLE | {"HEADS_PER_BLOCK": 2} | row for row in TWO_HEADS),
]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """All in one process, for a test of any of them needs a compiler's start."""
    return compile_rows("sm_90a", ROWS)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("i", range(len(ROWS)), ids=[str(row) for row in (*LAUNCHED, *PINNED, *TWO_HEADS)])
def test_resources(i: int, compiled: list[dict]):
    row, heads = compiled[i], ROWS[i].get("HEADS_PER_BLOCK", 1)
    assert row["launched"]["HEADS_PER_BLOCK"] == heads, row
    assert 0 < row["registers"] <= MAX_REGISTERS, row
    ends = row["N"] == 256 and row["launched"]["CHUNKS_PER_PIECE"] * CHUNK < row.get("T", 8192)
    limit = MAX_SPILLED_OF_ENDS if ends else MAX_SPILLED if heads == 1 else MAX_SPILLED_OF_TWO
    assert max(row["spill_bytes"], row["stack_bytes"]) <= limit, row
    assert row["shared_bytes"] <= SHARED_LIMIT, row
    assert heads == 2 or row["launched"]["num_stages"] in (2, 4), row


def test_the_plain_call_spills_nothing(compiled: list[dict]):
    assert (compiled[0]["spill_bytes"], compiled[0]["stack_bytes"]) == (0, 0), compiled[0]
    assert compiled[-len(TWO_HEADS)]["spill_bytes"] <= 32, compiled[-len(TWO_HEADS)]
