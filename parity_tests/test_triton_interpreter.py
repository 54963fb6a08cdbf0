"""Triton's interpreter as an importer of `triton_ssm` has it: its products and casts of bfloat16."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np

from triton_ssm._interpreter import to_bfloat16

PROGRAM = """
import torch, triton_ssm

def call(dtype):
    torch.manual_seed(0)
    x, B, C = torch.randn(3, 1, 20, 1, 16).to(dtype)
    return triton_ssm.mamba_chunk_scan_combined(x, torch.ones(1, 20, 1), -torch.ones(1), B, C, chunk_size=16)[0].float()

right = call(torch.float32)
print(float((call(torch.bfloat16) - right).norm() / right.norm()))
"""


def test_a_scan_in_bfloat16_without_the_tests_help():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert 1e-5 < float(done.stdout) < 1e-2


def test_rounding_is_to_nearest_even():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)
    bits[:6] = 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001  # halfway, to inf, inf, NaN
    values = bits.view(np.float32)
    with np.errstate(all="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    got = to_bfloat16(values).view(ml_dtypes.bfloat16)
    assert (np.isnan(got) == np.isnan(expected)).all()
    there = ~np.isnan(expected)
    assert (got.view(np.uint16) == expected.view(np.uint16))[there].all()
