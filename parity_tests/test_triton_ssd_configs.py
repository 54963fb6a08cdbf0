"""The declarations of the SSD stages' tuning tables, and the chunk-aligned layout that both packages convert to and from."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_ssm
import ssm_configs
import triton_ssm
from ssm_configs import SPECS, Device, read_table, write_table
from ssm_configs.spec import check_knobs

from .configs_env import forget_everything
from .inputs import chunk_aligned

OPS = tuple(name for name in SPECS if name.startswith("ssd_"))
H200 = Device("NVIDIA H200", (9, 0))
SIZES = {"nheads": 128, "headdim": 64, "dstate": 128, "chunk_size": 256}


def statics(op: str) -> dict[str, int]:
    return {key: SIZES[key] for key in SPECS[op].static_keys}


def test_every_stage_is_declared():
    assert set(OPS) == {"ssd_chunk_cumsum", "ssd_chunk_state", "ssd_state_passing", "ssd_bmm_chunk", "ssd_chunk_scan"}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_heuristic_is_legal_and_does_not_depend_on_the_size(op, dtype):
    """What a sequence comes to depends on the blocks that sums are taken in, and must not on what it is packed with."""
    spec = SPECS[op]
    found = [spec.heuristic(statics(op), dtype, H200, size) for size in (0, 1, 1 << 14, 1 << 40)]
    check_knobs(spec.knobs, found[0], statics(op))
    assert all(knobs == found[0] for knobs in found)


@pytest.mark.parametrize("op", OPS)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_the_pallas_rule_is_legal_for_every_shared_config(op, data):
    spec = SPECS[op]
    shared = {knob.name: data.draw(st.sampled_from(sorted(knob.legal))) for knob in spec.knobs}  # type: ignore[arg-type]
    knobs = spec.pallas_rule(shared, statics(op))
    check_knobs(spec.pallas_knobs, knobs, statics(op))
    assert knobs.items() <= shared.items()


@pytest.mark.parametrize("op", OPS)
def test_a_table_serves_both_twins(op, tmp_path, monkeypatch):
    forget_everything(monkeypatch)
    spec, dtype = SPECS[op], SPECS[op].dtypes[-1]
    entry = spec.heuristic(statics(op), dtype, H200, 0) | {"num_warps": 8}
    name = ssm_configs.table_file_name(op, device=H200, dtype=dtype, **statics(op))
    (tmp_path / op).mkdir()
    write_table(tmp_path / op / name, {"1024": entry}, spec, statics(op))
    assert read_table(tmp_path / op / name, spec, statics(op)).nearest(7).shared == entry
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(tmp_path))
    where = {"device": H200, "dtype": dtype, "size": 7, **statics(op)}
    assert ssm_configs.lookup(op, twin="triton", **where).knobs == entry
    assert ssm_configs.lookup(op, twin="pallas", **where).knobs == spec.pallas_rule(entry, statics(op))


BOTH = pytest.mark.parametrize(
    "layouts, array", [(triton_ssm.layouts, torch.tensor), (pallas_ssm.layouts, jnp.array)], ids=["triton", "pallas"]
)


@BOTH
@pytest.mark.parametrize("bounds, T", [
    (None, 37), (None, 0), ([0, 17, 17, 18, 30], 37), ([0, 16, 48], 48), ([0, 0], 0), ([0], 5), ([0, 0, 0], 7), ([0, 40], 40),
])  # fmt: skip
def test_chunk_aligned_rows_there_and_back(layouts, array, bounds, T):
    x = np.random.default_rng(0).standard_normal((2 if bounds is None else 1, T, 3), np.float32)
    kept, named = x.copy(), {"chunk_size": 16}
    if bounds is not None:
        x[:, bounds[-1] :] = np.nan  # padding is not copied, whatever it holds
        kept[:, bounds[-1] :] = 0
        named["cu_seqlens"] = array(np.array(bounds, np.int32))
    rows = layouts.to_chunk_aligned(array(x), **named)
    expected = chunk_aligned(x, T, 16, None if bounds is None else np.array(bounds))
    np.testing.assert_array_equal(np.asarray(rows), expected)
    np.testing.assert_array_equal(np.asarray(layouts.from_chunk_aligned(rows, tokens=T, **named)), kept)


@BOTH
def test_chunk_aligned_errors(layouts, array):
    x = array(np.zeros((1, 32, 3), np.float32))
    with pytest.raises(ValueError, match=r"tensor: expected 48 rows for 33 tokens, got shape \(1, 32, 3\)"):
        layouts.from_chunk_aligned(x, chunk_size=16, tokens=33)
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
        layouts.to_chunk_aligned(x, chunk_size=0)
