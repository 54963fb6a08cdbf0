"""The written rules, which launch where no table is: legal for all sizes, and near the best wherever the tuning logs tell."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.run_command import RESULTS
from benchmarks.tuning_log import TuningLog
from ssm_configs import SPECS, Device
from ssm_configs.spec import TWINS, Knobs, OpSpec, check_knobs

H200 = Device("NVIDIA H200", (9, 0))
DEVICES = (H200, Device("NVIDIA A100-SXM4-80GB", (8, 0)), Device("NVIDIA B200", (10, 0)), Device("Abacus"))
LOGS = RESULTS / "NVIDIA_H200" / "tuning"


def sizes_of(op: str) -> dict[str, st.SearchStrategy[int]]:
    """Legal static sizes by key."""
    powers = st.sampled_from([16, 32, 64] if "gated" in op or op.startswith("gdn") else [16 << i for i in range(8)])
    named = {"nheads": st.integers(1, 300), "chunk_size": powers, "width": st.integers(2, 4)}
    return {key: named.get(key, st.integers(1, 1100)) for key in SPECS[op].static_keys}


@pytest.mark.parametrize("op", SPECS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_rule_is_legal_for_every_size(op, data):
    spec = SPECS[op]
    statics = {key: data.draw(sizes, label=key) for key, sizes in sizes_of(op).items()}
    size = data.draw(st.sampled_from([0, 1, 1 << 40]) | st.integers(0, 1 << 26), label="size")
    dtype, device = data.draw(st.sampled_from(spec.dtypes)), data.draw(st.sampled_from(DEVICES))
    shared = spec.heuristic(statics, dtype, device, size)
    check_knobs(spec.knobs, shared, statics)
    for twin in TWINS:
        check_knobs(spec.knobs_of(twin), spec.launch_knobs(twin, shared, None, statics), statics)


def ratios(op: str, twin: str) -> tuple[list[float], int]:
    """The rule's time over the best one at each size of each log where every candidate was timed, and at how many of these the
    rule's config was no candidate. (Elsewhere the best were: a rule that is among them would always look good.)"""
    spec, found, missing = SPECS[op], [], 0
    for path in sorted((LOGS / op).glob(f"* {twin}.jsonl")):
        keys = dict(part.split("=") for part in path.stem.removesuffix(f" {twin}").split(","))
        statics = {key: int(keys[key]) for key in spec.static_keys}
        logged = _times(path, spec, twin)
        most = max(map(len, logged.values()))
        for size, times in logged.items():
            if len(times) < most:
                continue
            rule = spec.heuristic(statics, keys[spec.dtype_key], H200, size)
            us = times.get(_key(spec.launch_knobs(twin, rule, None, statics)))
            if us is None:
                missing += 1
            else:
                found.append(us / min(times.values()))
    return found, missing


def _times(path: Path, spec: OpSpec, twin: str) -> dict[int, dict[Any, float]]:
    """Of the last versions that the log has times of; a knob that it is older than has its default."""
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    log = TuningLog(path, [record["identity"] for record in records if record["kind"] == "time"][-1])
    missing = {knob.name: knob.default for knob in spec.knobs_of(twin) if knob.default is not None}
    return {
        size: {_key(missing | dict(config)): us for config, us in times.items()} for size, times in log.times.items()
    }


def _key(knobs: Knobs) -> Any:
    return tuple(sorted(knobs.items()))


@pytest.mark.parametrize(
    ("op", "twin", "measured", "median", "worst"),
    [
        ("selective_state_update", "triton", 1.0, 1.02, 1.25),
        ("selective_state_update", "pallas", 1.0, 1.03, 1.12),
        ("mamba_chunk_scan_combined", "triton", 0.7, 1.02, 1.15),
        ("mamba_chunk_scan_combined", "pallas", 0.9, 1.02, 1.03),
        ("causal_conv1d", "triton", 1.0, 1.03, 1.1),
        ("causal_conv1d_update", "triton", 1.0, 1.03, 1.12),
        ("causal_conv1d_update", "pallas", 1.0, 1.03, 1.08),
        ("fused_recurrent_gated_delta_rule", "triton", 1.0, 1.03, 1.15),
        ("fused_recurrent_gated_delta_rule", "pallas", 1.0, 1.03, 1.12),
        ("ssd_chunk_cumsum", "triton", 1.0, 1.03, 1.2),
    ],
)
def test_a_rule_is_near_the_best_that_was_measured(op, twin, measured, median, worst):
    found, missing = ratios(op, twin)
    assert len(found) >= measured * (len(found) + missing)
    assert statistics.median(found) <= median and max(found) <= worst, (statistics.median(found), max(found))


def knobs(op: str, dtype: str, size: int, **statics: int) -> tuple[Any, ...]:
    return tuple(SPECS[op].heuristic(statics, dtype, H200, size).values())


@pytest.mark.parametrize("dstate, rows", [(16, 64), (64, 16), (100, 8), (128, 8), (256, 4), (2000, 1)])
def test_a_decode_steps_programs_hold_1024_elements_or_a_row(dstate, rows):
    spread = 4 if dstate <= 64 else max(1, 2048 * (dstate > 1024) // 1024)
    sizes = {"headdim": 64, "dstate": dstate}
    assert knobs("selective_state_update", "float16", 1, **sizes) == (rows, spread)
    assert knobs("selective_state_update", "float16", 1 << 16, **sizes) == (rows, 2 if dstate > 1024 else 1)
    assert knobs("selective_state_update", "float32", 1 << 16, **sizes) == (rows, spread)
    # Never more rows than a head has.
    assert knobs("selective_state_update", "float16", 1 << 16, headdim=3, dstate=dstate)[0] == min(rows, 4)


def test_a_delta_rules_step_has_narrow_columns_where_the_state_is_small():
    op, sizes = "fused_recurrent_gated_delta_rule", {"K": 128, "V": 128}
    assert [knobs(op, "float16", size, **sizes) for size in (1, 32, 64, 1 << 15)] == 2 * [(16, 4)] + 2 * [(32, 2)]
    assert [knobs(op, "float32", size, **sizes) for size in (1, 32, 64, 1 << 15)] == 2 * [(8, 1)] + 2 * [(64, 4)]
    assert knobs(op, "float16", 1 << 15, K=64, V=16) == (16, 1)


@pytest.mark.parametrize(
    "nheads, headdim, tokens, heads, pieces",
    [
        (128, 64, 8192, 1, 1),
        (80, 64, 8192, 2, 3),
        (16, 64, 8192, 1, 8),
        (16, 64, 1024, 1, 4),
        (32, 128, 8192, 1, 2),
        (32, 128, 1024, 1, 1),
        (64, 64, 1024, 1, 1),
        (128, 64, 1024, 1, 1),
        (1, 64, 64, 1, 1),
    ],
)
def test_a_scan_is_cut_where_that_pays(nheads, headdim, tokens, heads, pieces):
    sizes = {"nheads": nheads, "headdim": headdim, "dstate": 128}
    shared = SPECS["mamba_chunk_scan_combined"].heuristic(sizes, "float16", H200, tokens)
    assert shared["HEADS_PER_BLOCK"] == heads
    assert -(-tokens // (64 * int(shared["CHUNKS_PER_PIECE"]))) == pieces
