"""The Mosaic GPU kernels of the chunked scan's stages compile for the H200 without one: no spills, within shared memory."""

import pytest

from .gates_mosaic import SSD_STAGES
from .test_pallas_gates import MAX_REGISTERS, SHARED_LIMIT, compile_rows

STAGES = [
    {"op": op, "T": T, "H": 16, "G": 2, "L": L, "dtype": dtype, **sizes}
    for op in SSD_STAGES
    for T, L, dtype, sizes in (
        (1024, 256, "bfloat16", {"P": 64, "N": 128, "sequences": 8}),
        (1000, 64, "float16", {"P": 64, "N": 64}),
        (1024, 128, "bfloat16", {"P": 128, "N": 256, "sequences": 3}),
    )
]


@pytest.mark.timeout(600)
def test_stages():
    results = compile_rows("sm_90a", STAGES)
    assert len(results) == len(STAGES)
    for result in results:
        assert result["spill_bytes"] == result["stack_bytes"] == 0, f"spills: {result}"
        assert 0 < result["registers"] <= MAX_REGISTERS, result
        assert result["shared_bytes"] <= SHARED_LIMIT["sm_90a"], f"too much shared memory: {result}"
