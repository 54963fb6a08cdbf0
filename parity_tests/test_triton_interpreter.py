"""What Triton's own interpreter, which `interpret_triton` mends for the tests, must not be asked for."""

import os
import subprocess
import sys

PROGRAM = """
import torch, triton_ssm
from triton_ssm.ssd import bmm_chunk

def call(dtype):
    x, B = torch.ones(1, 4, 1, 16, dtype=dtype), torch.ones(1, 4, 1, 16, dtype=dtype)
    return triton_ssm.mamba_chunk_scan_combined(x, torch.ones(1, 4, 1), -torch.ones(1), B, B, chunk_size=16)[0]

print(float(call(torch.float16)[0, 0, 0, 0]))
for wrong in (call, lambda dtype: bmm_chunk(*torch.ones(2, 1, 4, 1, 16, dtype=dtype), chunk_size=16)):
    try:
        wrong(torch.bfloat16)
    except TypeError as error:
        print(error)
"""


def test_products_of_bfloat16_are_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    right, *refused = done.stdout.splitlines()
    assert float(right) == 16.0
    assert [text.partition(" of which")[0] for text in refused] == [
        f"{name}: expected float32 or float16 under TRITON_INTERPRET=1, got bfloat16," for name in ("x", "C")
    ]
