"""The declarations of the convolutions' tuning tables: rules, heuristics, names, and a table of each through a look-up."""

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ssm_configs
from ssm_configs import SPECS, Device, TableWarning, read_table, write_table
from ssm_configs.spec import check_knobs

from .configs_env import forget_everything

OPS = ("causal_conv1d", "causal_conv1d_update")
H200 = Device("NVIDIA H200", (9, 0))
STATICS = {"width": 4}
ENTRIES = {
    "causal_conv1d": {"BLOCK_SIZE_T": 32, "BLOCK_SIZE_D": 256, "num_warps": 4},
    "causal_conv1d_update": {"BLOCK_SIZE_D": 256, "BLOCK_SIZE_B": 2, "num_warps": 2},
}
TUNED_AT = {"causal_conv1d": {"T": 8192, "D": 10240}, "causal_conv1d_update": {"B": 64, "D": 10240}}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    forget_everything(monkeypatch)


@pytest.mark.parametrize("op", OPS)
@settings(deadline=None)
@given(data=st.data())
def test_the_pallas_rule_is_legal_for_every_shared_config(op, data):
    spec = SPECS[op]
    shared = {}
    for knob in spec.knobs:
        assert not isinstance(knob.legal, type)
        shared[knob.name] = data.draw(st.sampled_from(list(knob.legal)))
    knobs = spec.pallas_rule(shared, STATICS)
    check_knobs(spec.pallas_knobs, knobs, STATICS)


@pytest.mark.parametrize(
    "op, shared, pallas",
    [
        ("causal_conv1d", (32, 256, 4), {"BLOCK_SIZE_T": 32, "BLOCK_SIZE_D": 256}),
        ("causal_conv1d", (32, 256, 1), {"BLOCK_SIZE_T": 32, "BLOCK_SIZE_D": 1024}),
        ("causal_conv1d", (256, 4096, 4), {"BLOCK_SIZE_T": 128, "BLOCK_SIZE_D": 2048}),
        ("causal_conv1d", (1, 16, 8), {"BLOCK_SIZE_T": 4, "BLOCK_SIZE_D": 64}),
        ("causal_conv1d_update", (256, 1, 2), {"BLOCK_SIZE_D": 512, "BLOCK_SIZE_B": 1}),
        ("causal_conv1d_update", (16, 8, 4), {"BLOCK_SIZE_D": 64, "BLOCK_SIZE_B": 8}),
    ],
)
def test_pallas_rule_examples(op, shared, pallas):
    spec = SPECS[op]
    named = dict(zip((knob.name for knob in spec.knobs), shared, strict=True))
    assert spec.pallas_rule(named, STATICS) == pallas


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", [0, 1, 10240, 1 << 18, 1 << 22, 1 << 40])
def test_the_heuristic_is_legal_at_any_size(op, size):
    spec = SPECS[op]
    check_knobs(spec.knobs, spec.heuristic(STATICS, "float16", H200, size), STATICS)


def test_the_heuristic_grows_its_block_while_programs_are_plenty():
    sizes = [1 << power for power in range(14, 26)]
    tokens = [SPECS["causal_conv1d"].heuristic(STATICS, "float16", H200, size)["BLOCK_SIZE_T"] for size in sizes]
    assert tokens == sorted(tokens) and tokens[0] == 8 and tokens[-1] == 32 and 16 in tokens
    steps = [SPECS["causal_conv1d_update"].heuristic(STATICS, "float16", H200, size) for size in sizes]
    blocks = [(step["BLOCK_SIZE_D"], step["BLOCK_SIZE_B"]) for step in steps]
    assert blocks == sorted(blocks) and blocks[0] == (128, 1) and blocks[-1] == (512, 2)
    for size, (channels, sequences) in zip(sizes, blocks, strict=True):
        assert channels == 128 or size // (channels * sequences) >= 512
    for size, rows in zip(sizes, tokens, strict=True):
        assert rows == 8 or size // (rows * 256) >= 1024


@pytest.mark.parametrize("op", OPS)
def test_a_table_serves_both_twins(op, tmp_path, monkeypatch):
    spec, entry = SPECS[op], ENTRIES[op]
    name = ssm_configs.table_file_name(op, device=H200, dtype="bfloat16", **STATICS)
    assert name == "width=4,device_name=NVIDIA_H200,dtype=float16.json"
    assert ssm_configs.parse_table_file_name(op, name) == (STATICS, "NVIDIA_H200", "float16")
    own = spec.pallas_rule(entry, STATICS) | {"BLOCK_SIZE_D": 64}
    (tmp_path / op).mkdir()
    table = {"1024": entry, "83886080": entry | {"pallas": own, "tuned_at": TUNED_AT[op]}}
    write_table(tmp_path / op / name, table, spec, STATICS)
    assert read_table(tmp_path / op / name, spec, STATICS).nearest(1 << 30).tuned_at == TUNED_AT[op]

    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(tmp_path))
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    where = {"device": H200, "dtype": "bfloat16", **STATICS}
    found = ssm_configs.lookup(op, twin="triton", size=8192 * 10240, **where)
    assert (found.source, found.key, found.knobs) == ("SSM_TUNED_CONFIG_FOLDER", 83886080, entry)
    assert ssm_configs.lookup(op, twin="pallas", size=8192 * 10240, **where).knobs == own
    assert ssm_configs.lookup(op, twin="pallas", size=7, **where).knobs == spec.pallas_rule(entry, STATICS)
    monkeypatch.delenv("SSM_TUNED_CONFIG_FOLDER")
    told = str(ssm_configs.explain(op, twin="triton", size=7, **where))
    assert f"size 7 = {spec.size_key}" in told and "vLLM has no tables for this operator" in told


@pytest.mark.parametrize("op", OPS)
def test_without_a_table_the_heuristic_and_one_warning(op):
    device = Device("Abacus")
    with pytest.warns(TableWarning, match=f"{op}: no tuning table width=4,device_name=Abacus,dtype=float32.json"):
        config = ssm_configs.lookup(op, twin="triton", device=device, dtype="float32", size=1 << 20, **STATICS)
    assert config.source == "heuristic"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ssm_configs.lookup(op, twin="triton", device=device, dtype="float32", size=1 << 22, **STATICS)


@pytest.mark.parametrize("op", OPS)
def test_overrides_by_name_and_by_twin(op):
    where = {"device": H200, "dtype": "float16", "size": 1 << 20, **STATICS}
    with ssm_configs.override(op, twin=None, **ENTRIES[op]):
        assert ssm_configs.lookup(op, twin="triton", **where).knobs == ENTRIES[op]
        assert ssm_configs.lookup(op, twin="pallas", **where).knobs == SPECS[op].pallas_rule(ENTRIES[op], STATICS)
    with pytest.raises(ValueError, match="BLOCK_SIZE_D: got 100, expected one of"):
        with ssm_configs.override(op, BLOCK_SIZE_D=100):
            pass


@pytest.mark.parametrize("op", OPS)
def test_shipped_tables_are_valid_and_state_their_source(op):
    for table in ssm_configs.shipped_tables(op):
        read = read_table(table.path, SPECS[op], table.statics)
        assert read.metadata["source"]
        ssm_configs.architecture(table.device_name)
