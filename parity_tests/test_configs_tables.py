"""Tables as files: names, devices, strict reading, atomic writing."""

import copy
import json
import os
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ssm_configs
from ssm_configs import Device, TableError, read_table, write_table

from .configs_env import OP, SPEC, STATICS, VLLM_DATA, entry, put_table

SHIPPED = list(ssm_configs.shipped_tables(OP))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """One file for all examples that hypothesis draws."""
    return tmp_path_factory.mktemp("scratch") / "table.json"


# Names and devices


@pytest.mark.parametrize(
    "name, table_name",
    [
        ("NVIDIA H200", "NVIDIA_H200"),
        ("NVIDIA  H100\t80GB HBM3", "NVIDIA_H100_80GB_HBM3"),
        ("Intel(R) Arc(TM) Pro B60 Graphics", "Intel(R)_Arc(TM)_Pro_B60_Graphics"),
        ("AMD Instinct MI300X / MI300X VF", "AMD_Instinct_MI300X_MI300X_VF"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA_A100-SXM4-80GB"),
    ],
)
def test_device_names_become_table_names_by_vllms_rule(name, table_name):
    assert Device(name).table_name == table_name


@pytest.mark.parametrize("arguments", [("",), (None,), ("x", 9), ("x", (9,)), ("x", [9, 0]), ("x", (9.0, 0))])
def test_device_refuses_what_is_no_device(arguments):
    with pytest.raises(TypeError, match=r"Device\.(name|capability): expected"):
        Device(*arguments)


def test_file_names_round_trip():
    name = ssm_configs.table_file_name(OP, device=Device("NVIDIA H200"), dtype="bfloat16", dstate=128, headdim=64)
    assert name == "headdim=64,dstate=128,device_name=NVIDIA_H200,cache_dtype=float16.json"
    assert ssm_configs.parse_table_file_name(OP, name) == (STATICS, "NVIDIA_H200", "float16")


@pytest.mark.parametrize(
    "name",
    [
        "headdim=64,device_name=X,cache_dtype=float16.json",
        "dstate=128,headdim=64,device_name=X,cache_dtype=float16.json",
        "headdim=064,dstate=128,device_name=X,cache_dtype=float16.json",
        "headdim=0,dstate=128,device_name=X,cache_dtype=float16.json",
        "headdim=64,dstate=128,device_name=X Y,cache_dtype=float16.json",
        "headdim=64,dstate=128,device_name=X,cache_dtype=bfloat16.json",
        "headdim=64,dstate=128,device_name=X,cache_dtype=float16.json.bak",
    ],
)
def test_other_file_names_are_refused(name):
    with pytest.raises(TableError, match="not a table name of selective_state_update, expected headdim=<int>"):
        ssm_configs.parse_table_file_name(OP, name)


def test_every_alias_leads_to_a_device_with_an_architecture():
    with open(os.path.join(os.path.dirname(ssm_configs.__file__), "devices.json"), encoding="utf-8") as file:
        devices = json.load(file)
    for name, target in devices["aliases"].items():
        assert name not in devices["architectures"], f"{name} has tables of its own"
        assert ssm_configs.alias(name) == target["table"]
        assert ssm_configs.architecture(name) == devices["architectures"][target["table"]]
        assert target["note"].endswith("."), f"{name}: say why"


def test_architectures():
    assert ssm_configs.architecture("NVIDIA_GH200_144G_HBM3e") == "sm_90"
    assert ssm_configs.architecture("NVIDIA_GB200") == "sm_100"
    assert ssm_configs.architecture("Intel(R)_Arc(TM)_Pro_B60_Graphics") is None
    with pytest.raises(ValueError, match="got 'Abacus', expected one of"):
        ssm_configs.architecture("Abacus")


# Shipped tables


@pytest.mark.parametrize("table", SHIPPED, ids=lambda table: table.path.stem)
def test_shipped_tables_are_valid_and_state_their_source(table):
    read = read_table(table.path, SPEC, table.statics)
    if table.device_name != "NVIDIA_H200":
        assert read.metadata["source"] == "vLLM 0.33.0 (Apache-2.0), measured by its contributors"
    ssm_configs.architecture(table.device_name)  # raises unless the compile gates know what to do with it


def test_the_shipped_set_is_vllms_beside_our_own():
    theirs = [table for table in SHIPPED if table.device_name != "NVIDIA_H200"]
    assert len(theirs) == 32
    assert len({table.device_name for table in theirs}) == 10


def test_vllms_own_h200_tables_load():
    paths = list(VLLM_DATA.glob("*.json"))
    assert len(paths) == 2
    for path in paths:
        statics, device_name, _ = ssm_configs.parse_table_file_name(OP, path.name)
        assert device_name == "NVIDIA_H200"
        assert len(read_table(path, SPEC, statics).entries) == 21


# Reading


def test_a_full_entry_is_read(tmp_path):
    pallas = {"BLOCK_SIZE_M": 64, "tiles_per_block": 2, "use_tma": False}
    full = entry(4, 1, pallas=pallas, triton=entry(8, 2), tuned_at={"B": 8, "H": 128})
    path = put_table(tmp_path, {"date": "2025-01-01", "1024": full, "8": entry(16, 4), "measured": {"us": [1.5]}})
    table = read_table(path, SPEC, STATICS)
    assert [item.size for item in table.entries] == [8, 1024]
    assert table.entries[1].shared == entry(4, 1)
    assert table.entries[1].own == {"triton": entry(8, 2), "pallas": pallas}
    assert table.entries[1].tuned_at == {"B": 8, "H": 128}
    assert table.metadata == {"date": "2025-01-01", "measured": {"us": [1.5]}}
    assert table.path == str(path)


@pytest.mark.parametrize(
    "key, value, reason",
    [
        ("8", None, "the config: expected an object, got null"),
        ("8", [4, 1], "the config: expected an object, got list"),
        ("8", {}, "missing knob 'BLOCK_SIZE_M', 'num_warps'"),
        ("8", {"BLOCK_SIZE_M": 4}, "missing knob 'num_warps'"),
        ("8", entry(4, 1, num_stages=2), "unknown knob 'num_stages'; expected BLOCK_SIZE_M, num_warps"),
        ("8", entry("4", 1), r"BLOCK_SIZE_M: expected int, got '4' \(str\)"),
        ("8", entry(4.0, 1), r"BLOCK_SIZE_M: expected int, got 4.0 \(float\)"),
        ("8", entry(4, True), r"num_warps: expected int, got True \(bool\)"),
        ("8", entry(3, 1), "BLOCK_SIZE_M: got 3, expected one of 1, 2, 4, 8"),
        ("8", entry(2048, 1), "BLOCK_SIZE_M: got 2048"),
        ("8", entry(4, 0), "num_warps: got 0"),
        ("8", entry(4, 64), "num_warps: got 64"),
        ("8", entry(4, 1, triton=None), '"triton": expected an object, got null'),
        ("8", entry(4, 1, triton={"num_warps": 1}), "\"triton\": missing knob 'BLOCK_SIZE_M'"),
        ("8", entry(4, 1, pallas=entry(4, 1)), "\"pallas\": unknown knob 'num_warps'"),
        (
            "8",
            entry(4, 1, pallas={"BLOCK_SIZE_M": 24, "tiles_per_block": 1, "use_tma": True}),
            '"pallas": BLOCK_SIZE_M: got 24, which does not divide headdim=64',
        ),
        (
            "8",
            entry(4, 1, pallas={"BLOCK_SIZE_M": 16, "tiles_per_block": 1, "use_tma": 1}),
            '"pallas": use_tma: expected bool, got 1',
        ),
        (
            "8",
            entry(4, 1, pallas={"BLOCK_SIZE_M": 16, "tiles_per_block": 3, "use_tma": True}),
            '"pallas": tiles_per_block: got 3',
        ),
        ("8", entry(4, 1, tuned_at=[8, 1]), '"tuned_at": expected an object, got list'),
        ("8", entry(4, 1, tuned_at={"B": 8}), '"tuned_at": expected positive ints for exactly B, H'),
        ("8", entry(4, 1, tuned_at={"B": 8, "H": True}), '"tuned_at": expected positive ints'),
        ("08", entry(4, 1), "expected a positive size in plain digits without leading zeros"),
        ("0", entry(4, 1), "expected a positive size"),
        ("-8", entry(4, 1), "expected a positive size"),
        (" 8", entry(4, 1), "expected a positive size"),
        ("1_024", entry(4, 1), "expected a positive size"),
        ("٨", entry(4, 1), "expected a positive size"),
        ("²", entry(4, 1), "invalid literal for int"),
        ("9" * 5000, entry(4, 1), "Exceeds the limit"),
    ],
)
def test_a_malformed_entry_is_named_by_file_key_and_reason(tmp_path, key, value, reason):
    path = put_table(tmp_path, {"triton_version": "3.6.0", "16": entry(4, 1), key: value})
    with pytest.raises(TableError, match=reason) as caught:
        read_table(path, SPEC, STATICS)
    assert str(path) in str(caught.value)
    assert f"key {key!r}: " in str(caught.value)
    assert (caught.value.path, caught.value.key) == (str(path), key)


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"{", "is not a table: Expecting"),
        (b'{"8": {"BLOCK_SIZE_M": 4, "num_warps": 1}', "is not a table: Expecting"),
        (b'{"8": {"BLOCK_SIZE_M": 4, "num_warps": 1}} x', "is not a table: Extra data"),
        (b"[]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got null"),
        (b"{}", "holds no config"),
        (b'{"triton_version": "3.6.0"}', "holds no config"),
        (b'{"8": {"BLOCK_SIZE_M": 4, "num_warps": 1}, "8": {}}', "key '8' stands twice"),
        (b'{"8": {"BLOCK_SIZE_M": 4, "num_warps": 1, "num_warps": 2}}', "key 'num_warps' stands twice"),
        (b'{"us": NaN, "8": {"BLOCK_SIZE_M": 4, "num_warps": 1}}', "NaN is not a JSON number"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"\xff\xfe{}", "is not UTF-8"),
    ],
)
def test_a_malformed_file_is_named_with_the_reason(tmp_path, text, reason):
    path = tmp_path / "table.json"
    path.write_bytes(text)
    with pytest.raises(TableError, match=reason) as caught:
        read_table(path, SPEC, STATICS)
    assert str(path) in str(caught.value)


def test_an_unreadable_file_is_a_table_error(tmp_path):
    with pytest.raises(TableError, match="cannot be read: Is a directory"):
        read_table(tmp_path, SPEC, STATICS)
    with pytest.raises(TableError, match="cannot be read: No such file"):
        read_table(tmp_path / "absent.json", SPEC, STATICS)


def test_table_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(TableError("file.json", "is odd", "8")))
    assert (str(error), error.key) == ("file.json: key '8': is odd", "8")


GOOD = {"triton_version": "3.6.0", **{str(8 << i): entry(4 << i % 3, 1 << i % 4) for i in range(6)}}
LEGAL = {"BLOCK_SIZE_M": [1 << i for i in range(11)], "num_warps": [1, 2, 4, 8, 16, 32]}
SIZES = [key for key in GOOD if key.isdigit()]
GOOD_TEXT = json.dumps(GOOD, indent=4)
TEXT = st.text("abc_ 018.")
NOT_AN_INT = st.none() | st.booleans() | st.floats(allow_nan=False) | TEXT | st.lists(st.integers(), max_size=2)


@st.composite
def corrupt_tables(draw) -> str:
    """A good table with one thing wrong."""
    table = copy.deepcopy(GOOD)
    size = draw(st.sampled_from(SIZES))
    knob = draw(st.sampled_from(list(LEGAL)))
    kind = draw(st.sampled_from(["truncate", "type", "value", "missing", "unknown", "config", "twice", "key", "wrap"]))
    match kind:
        case "truncate":
            return GOOD_TEXT[: draw(st.integers(0, len(GOOD_TEXT) - 1))]
        case "type":
            table[size][knob] = draw(NOT_AN_INT)
        case "value":
            table[size][knob] = draw(st.integers().filter(lambda value: value not in LEGAL[knob]))
        case "missing":
            del table[size][knob]
        case "unknown":
            table[size][draw(TEXT)] = 1  # the alphabet spells no known field
        case "config":
            table[size] = draw(NOT_AN_INT)
        case "twice":
            return GOOD_TEXT.replace(f'"{size}": {{', f'"{size}": {{"num_warps": 1}}, "{size}": {{', 1)
        case "key":
            table[draw(st.sampled_from(["0", "+", "-", " "])) + size] = table.pop(size)
        case "wrap":
            return json.dumps(draw(st.sampled_from([[table], "table", 8, None, {"tables": table}])))
    return json.dumps(table)


@settings(deadline=None)
@given(text=corrupt_tables())
def test_a_corrupt_table_is_always_a_table_error(scratch, text):
    scratch.write_text(text, encoding="utf-8")
    with pytest.raises(TableError):
        read_table(scratch, SPEC, STATICS)


@settings(deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(scratch, data):
    damaged = bytearray(GOOD_TEXT.encode())
    for position in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[position] = data.draw(st.integers(0, 255))
    scratch.write_bytes(damaged)
    try:
        table = read_table(scratch, SPEC, STATICS)
    except TableError:
        return
    # What is accepted after all (a digit became another) says what plain JSON says.
    plain = json.loads(bytes(damaged))
    assert {str(item.size): item.shared for item in table.entries} == {k: v for k, v in plain.items() if k.isdigit()}


# Writing


def test_writing_sorts_keeps_metadata_first_and_reads_back(tmp_path):
    path = tmp_path / "table.json"
    pallas = {"BLOCK_SIZE_M": 32, "tiles_per_block": 2, "use_tma": True}
    table = {"64": entry(4, 1, pallas=pallas), "zeta": [1.5], "8": entry(8, 2), "1024": entry(16, 2), "alpha": "ß"}
    write_table(path, table, SPEC, STATICS)
    assert list(json.loads(path.read_text(encoding="utf-8"))) == ["zeta", "alpha", "8", "64", "1024"]
    assert json.loads(path.read_text(encoding="utf-8")) == table
    assert len(path.read_text().splitlines()) == len(table) + 2  # one key a line: tables are read in diffs
    assert [item.size for item in read_table(path, SPEC, STATICS).entries] == [8, 64, 1024]


@pytest.mark.parametrize(
    "table, reason",
    [
        ({"8": entry(3, 1)}, "key '8': BLOCK_SIZE_M: got 3"),
        ({"source": "nowhere"}, "holds no config"),
        ({8: entry(4, 1)}, "expected keys of type str"),
        ({"8": entry(4, 1), "us": float("nan")}, "cannot be written as JSON"),
        ({"8": entry(4, 1), "us": object()}, "cannot be written as JSON"),
    ],
)
def test_writing_refuses_what_reading_would_and_leaves_the_old_file(tmp_path, table, reason):
    path = put_table(tmp_path, GOOD)
    with pytest.raises(TableError, match=reason):
        write_table(path, table, SPEC, STATICS)
    assert path.read_text() == GOOD_TEXT
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_half_way_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = put_table(tmp_path, GOOD)

    def fail(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)  # rename is atomic within one file system only
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        write_table(path, {"8": entry(4, 1)}, SPEC, STATICS)
    assert path.read_text() == GOOD_TEXT
    assert list(tmp_path.iterdir()) == [path]


# The Pallas rule


@settings(deadline=None)
@given(
    headdim=st.integers(1, 2048),
    rows=st.sampled_from(LEGAL["BLOCK_SIZE_M"]),
    warps=st.sampled_from(LEGAL["num_warps"]),
)
def test_the_pallas_rule_gives_a_legal_block_nearest_to_the_rows_per_warp(headdim, rows, warps):
    statics = {"headdim": headdim, "dstate": 128}
    knobs = SPEC.pallas_rule(entry(rows, warps), statics)
    assert knobs.keys() == {knob.name for knob in SPEC.pallas_knobs}
    for knob in SPEC.pallas_knobs:
        knob.check(knobs[knob.name], statics)

    block = knobs["BLOCK_SIZE_M"]
    target = min(max(rows * 4 / warps, 4), headdim)
    fits = [d for d in range(4, min(headdim, 1024) + 1, 4) if headdim % d == 0]
    if fits:
        distance = min(abs(d - target) for d in fits)
        assert block == max(d for d in fits if abs(d - target) == distance)
    elif headdim <= 1024:
        assert block == headdim


@pytest.mark.parametrize(
    "headdim, rows, warps, block, tma",
    [
        (64, 4, 1, 16, False),
        (64, 16, 2, 32, False),
        (64, 64, 1, 64, True),
        (64, 4, 8, 4, False),
        (80, 16, 4, 16, False),
        (80, 16, 2, 40, False),
        (6, 4, 1, 6, False),
        (60, 4, 2, 12, False),
    ],
)
def test_pallas_rule_examples(headdim, rows, warps, block, tma):
    knobs = SPEC.pallas_rule(entry(rows, warps), {"headdim": headdim, "dstate": 128})
    assert knobs == {"BLOCK_SIZE_M": block, "tiles_per_block": 1, "use_tma": tma}
