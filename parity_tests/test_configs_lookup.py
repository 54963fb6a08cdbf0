"""Where a launch config comes from: the order of the rules, caching, warnings, errors."""

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

import ssm_configs
from ssm_configs import Config, Device, TableError, TableWarning

from .configs_env import DEVICE, H100, OP, STATICS, entry, explain, forget_everything, lookup, put_table


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    forget_everything(monkeypatch)


IMPORT_ALL = """
import importlib, pkgutil, sys
import ssm_configs
for module in pkgutil.walk_packages(ssm_configs.__path__, "ssm_configs."):
    importlib.import_module(module.name)
print({"numpy", "torch", "jax", "triton"} & set(sys.modules))
"""


def test_importing_ssm_configs_imports_no_framework():
    environment = os.environ | {"PYTHONPATH": str(Path(ssm_configs.__file__).parents[1])}
    command = [sys.executable, "-c", IMPORT_ALL]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "set()"), result.stderr


# The order of the rules


def test_folders_come_in_order(tmp_path, monkeypatch):
    ours, vllms = tmp_path / "ours", tmp_path / "vllms"
    name = H100.table_name
    at_ours = put_table(ours / OP, {"8": entry(1, 1)}, device_name=name)
    at_vllms = put_table(vllms, {"8": entry(2, 1)}, device_name=name)

    shipped = lookup(8, device=H100)
    assert (shipped.source, shipped.key) == ("shipped", 8)
    assert shipped.path is not None and shipped.path.endswith(at_ours.name)

    # Each change of the environment takes effect at once.
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(vllms))
    config = lookup(8, device=H100)
    assert (config.source, config.path, config.knobs) == ("VLLM_TUNED_CONFIG_FOLDER", str(at_vllms), entry(2, 1))

    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(ours))
    config = lookup(8, device=H100)
    assert (config.source, config.path, config.knobs) == ("SSM_TUNED_CONFIG_FOLDER", str(at_ours), entry(1, 1))

    with ssm_configs.override(OP, **entry(512, 32)):
        config = lookup(8, device=H100)
        assert (config.source, config.path, config.key) == ("override", None, None)
        assert config.knobs == entry(512, 32)

    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", "")
    assert lookup(8, device=H100).source == "VLLM_TUNED_CONFIG_FOLDER"
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER")
    assert lookup(8, device=H100) == shipped


def test_a_folder_without_the_table_passes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(tmp_path))
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    assert lookup(8, device=H100).source == "shipped"


def test_an_unknown_device_gets_the_heuristic():
    with pytest.warns(TableWarning):
        config = lookup(8, device=Device("Abacus"))
    assert (config.source, config.path, config.key) == ("heuristic", None, None)


def test_the_own_name_comes_before_the_alias_in_each_folder(tmp_path, monkeypatch):
    nvl = Device("NVIDIA H100 NVL", (9, 0))
    assert lookup(4096, device=nvl) == lookup(4096, device=H100)
    assert lookup(4096, device=nvl).path == lookup(4096, device=H100).path

    ours, vllms = tmp_path / "ours", tmp_path / "vllms"
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(ours))
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(vllms))
    put_table(vllms, {"8": entry(2, 1)}, device_name=nvl.table_name)
    put_table(ours / OP, {"8": entry(4, 1)}, device_name=H100.table_name)
    assert lookup(8, device=nvl).knobs == entry(4, 1)  # the folder decides first, the name second

    put_table(ours / OP, {"8": entry(1, 1)}, device_name=nvl.table_name)
    ssm_configs.clear_cache()
    assert lookup(8, device=nvl).knobs == entry(1, 1)


def test_the_nearest_key_wins_and_the_lower_of_two(tmp_path, monkeypatch):
    put_table(
        tmp_path / OP, {"64": entry(64, 1), "16": entry(16, 1), "8": entry(8, 1)}
    )  # the file's order is no matter
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(tmp_path))
    keys = {0: 8, 1: 8, 8: 8, 12: 8, 13: 16, 16: 16, 40: 16, 41: 64, 64: 64, 1 << 40: 64}
    assert {size: lookup(size).key for size in keys} == keys
    assert all(lookup(size)["BLOCK_SIZE_M"] == key for size, key in keys.items())


def test_bfloat16_reads_the_float16_table(tmp_path, monkeypatch):
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(tmp_path))
    put_table(tmp_path / OP, {"8": entry(16, 1)}, dtype="float16")
    put_table(tmp_path / OP, {"8": entry(32, 1)}, dtype="float32")
    assert lookup(8, dtype="bfloat16") == lookup(8, dtype="float16") == entry(16, 1)
    assert lookup(8, dtype="float32") == entry(32, 1)


def test_twin_objects_serve_their_twin_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(tmp_path))
    pallas = {"BLOCK_SIZE_M": 64, "tiles_per_block": 4, "use_tma": False}
    table = {
        "8": entry(16, 2),
        "64": entry(16, 2, pallas=pallas),
        "512": entry(16, 2, triton=entry(4, 1)),
    }
    put_table(tmp_path / OP, table)
    by_rule = {"BLOCK_SIZE_M": 32, "tiles_per_block": 1, "use_tma": False}
    assert [lookup(size).knobs for size in (8, 64, 512)] == [entry(16, 2), entry(16, 2), entry(4, 1)]
    assert [lookup(size, twin="pallas").knobs for size in (8, 64, 512)] == [by_rule, pallas, by_rule]


# Folders and files that are not what they must be


def test_our_folder_must_exist(tmp_path, monkeypatch):
    put_table(tmp_path, "a file")
    for folder in (tmp_path / "absent", next(tmp_path.iterdir())):
        monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(folder))
        with pytest.raises(TableError, match="SSM_TUNED_CONFIG_FOLDER names a folder that does not exist") as caught:
            lookup(8, device=H100)
        assert str(folder) in str(caught.value)
        with pytest.raises(TableError):
            explain(8, device=H100)


def test_vllms_folder_need_not_exist_but_warns_once(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path / "absent"))
    with pytest.warns(TableWarning, match="VLLM_TUNED_CONFIG_FOLDER=.*absent is not a folder") as caught:
        assert lookup(8, device=H100).source == "shipped"
        assert lookup(16, device=H100).source == "shipped"
    assert len(caught) == 1
    assert caught[0].filename.endswith("configs_env.py")  # it points at the caller of lookup


@pytest.mark.parametrize("variable", ["SSM_TUNED_CONFIG_FOLDER", "VLLM_TUNED_CONFIG_FOLDER"])
def test_a_malformed_table_is_an_error_and_no_reason_to_look_further(tmp_path, monkeypatch, variable):
    folder = tmp_path / OP if variable.startswith("SSM") else tmp_path
    path = put_table(folder, {"8": entry(16, 3)}, device_name=H100.table_name)
    monkeypatch.setenv(variable, str(tmp_path))
    for _ in range(2):  # an error is not cached away
        with pytest.raises(TableError, match="key '8': num_warps: got 3") as caught:
            lookup(8, device=H100)
        assert str(path) in str(caught.value)


def test_a_dangling_link_is_a_broken_table_and_not_a_missing_one(tmp_path, monkeypatch):
    path = put_table(tmp_path / OP, {"8": entry(16, 1)})
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(tmp_path))
    with pytest.raises(TableError, match="cannot be read"):
        lookup(8)


# Warnings and caching


def test_a_missing_table_warns_once_per_file_name():
    with pytest.warns(TableWarning) as caught:
        for size in (8, 16):
            for twin in ("triton", "pallas"):
                lookup(size, twin=twin)
        lookup(8, dtype="bfloat16")  # reads the file of float16
        lookup(8, dtype="float32")
    assert len(caught) == 2
    assert "device_name=Some_Accelerator_80GB,cache_dtype=float16.json" in str(caught[0].message)
    assert "cache_dtype=float32.json" in str(caught[1].message)


def test_explain_gives_no_warning_and_takes_none_away():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(8)
    with pytest.warns(TableWarning):
        lookup(8)


def test_a_changed_file_counts_after_clear_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(tmp_path))
    put_table(tmp_path / OP, {"8": entry(16, 1)})
    assert lookup(8) == entry(16, 1)
    put_table(tmp_path / OP, {"8": entry(32, 1)})
    assert lookup(8) == lookup(9) == entry(16, 1)
    ssm_configs.clear_cache()
    assert lookup(8) == entry(32, 1)


def test_threads_agree_and_warn_once(monkeypatch):
    start = threading.Barrier(8)
    results: list[set[Config]] = []

    def work():
        start.wait()
        results.append({lookup(size, device=device) for size in range(200) for device in (DEVICE, H100)})

    threads = [threading.Thread(target=work) for _ in range(8)]
    with pytest.warns(TableWarning) as caught:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(caught) == 1
    assert len(results) == 8
    assert all(result == results[0] for result in results)


# What comes back


def test_a_config_is_a_hashable_mapping_that_equals_by_its_knobs():
    config = lookup(8192, device=H100)
    assert dict(config) == config.knobs == {"BLOCK_SIZE_M": config["BLOCK_SIZE_M"], "num_warps": config["num_warps"]}
    assert list(config) == ["BLOCK_SIZE_M", "num_warps"] and len(config) == 2
    assert str(config) == f"BLOCK_SIZE_M={config['BLOCK_SIZE_M']}, num_warps={config['num_warps']}"
    with pytest.raises(KeyError):
        config["num_stages"]
    with pytest.raises(AttributeError):
        config.source = "elsewhere"  # type: ignore[misc]
    config.knobs["BLOCK_SIZE_M"] = 0  # a copy
    assert config["BLOCK_SIZE_M"] != 0

    # Compiled kernels are cached by config: where it came from must not matter.
    twin = Config(config.pairs[::-1], "elsewhere")
    assert (twin, hash(twin)) == (config, hash(config))
    assert twin != Config((("BLOCK_SIZE_M", 1), ("num_warps", 1)), "elsewhere")


def test_explain_tells_every_rule_and_the_result(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    path = put_table(tmp_path, {"8": entry(16, 4)}, device_name=H100.table_name)
    nvl = Device("NVIDIA H100 NVL", (9, 0))
    assert str(explain(100, twin="pallas", device=nvl, dtype="bfloat16")).splitlines() == [
        "selective_state_update [pallas] on NVIDIA H100 NVL: headdim=64, dstate=128, bfloat16, "
        "size 100 = batch x nheads (batch = number of sequences)",
        "  override                  none",
        "  SSM_TUNED_CONFIG_FOLDER   not set",
        f"  VLLM_TUNED_CONFIG_FOLDER  {path}, key 8 (nearest to 100)",
        "  pallas_rule               from BLOCK_SIZE_M=16, num_warps=4",
        "  => VLLM_TUNED_CONFIG_FOLDER: BLOCK_SIZE_M=16, tiles_per_block=1, use_tma=False",
    ]


def test_explain_names_missing_files_and_the_heuristic(tmp_path, monkeypatch):
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(tmp_path))
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path / "absent"))
    explanation = explain(8)
    name = "headdim=64,dstate=128,device_name=Some_Accelerator_80GB,cache_dtype=float16.json"
    steps = {step.rule: step.outcome for step in explanation.steps}
    assert list(steps) == ["override", "SSM_TUNED_CONFIG_FOLDER", "VLLM_TUNED_CONFIG_FOLDER", "shipped", "heuristic"]
    assert steps["SSM_TUNED_CONFIG_FOLDER"] == f"no {name} in {tmp_path / OP}"
    assert steps["VLLM_TUNED_CONFIG_FOLDER"] == f"{tmp_path / 'absent'} does not exist"
    assert name in steps["shipped"]
    assert str(explanation).endswith("=> heuristic: BLOCK_SIZE_M=8, num_warps=1")


@pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")
@pytest.mark.parametrize("twin", ["triton", "pallas"])
@pytest.mark.parametrize("device", [DEVICE, H100], ids=lambda device: device.table_name)
def test_explain_never_differs_from_lookup(tmp_path, monkeypatch, twin, device):
    for size in (0, 8, 777, 1 << 20):
        plain, told = lookup(size, twin=twin, device=device), explain(size, twin=twin, device=device).config
        assert (plain, plain.source, plain.path, plain.key) == (told, told.source, told.path, told.key)
        with ssm_configs.override(OP, num_warps=2):
            assert explain(size, twin=twin, device=device).config == lookup(size, twin=twin, device=device)


# Arguments


@pytest.mark.parametrize("function", [ssm_configs.lookup, ssm_configs.explain])
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"op": "softmax"}, ValueError, r"op: got 'softmax', expected one of \('selective_state_update', "),
        ({"op": ["softmax"]}, TypeError, r"op: expected a name as str, got \['softmax'\]"),
        ({"twin": "cuda"}, ValueError, r"twin: got 'cuda', expected one of \('triton', 'pallas'\)"),
        ({"device": "NVIDIA H200"}, TypeError, "device: expected ssm_configs.Device, got 'NVIDIA H200'"),
        (
            {"dtype": "float64"},
            ValueError,
            r"dtype: got 'float64', expected one of \('float16', 'float32', 'bfloat16'\)",
        ),
        ({"dtype": 16}, TypeError, "dtype: expected a name as str, got 16"),
        ({"size": -1}, ValueError, "size: got -1, expected batch x nheads"),
        ({"size": 1.0}, TypeError, r"size: expected int, got 1.0 \(float\)"),
        ({"size": True}, TypeError, r"size: expected int, got True \(bool\)"),
        ({"headdim": 64.0}, TypeError, r"headdim: expected int, got 64.0 \(float\)"),
        ({"headdim": [64]}, TypeError, r"headdim: expected int, got \[64\] \(list\)"),
        ({"dstate": 0}, ValueError, "dstate: got 0, expected at least 1"),
        ({"nheads": 8}, TypeError, r"expected the static keys \('headdim', 'dstate'\), got"),
    ],
)
def test_wrong_arguments_are_named(function, change, error, message):
    good = {"op": OP, "twin": "triton", "device": H100, "dtype": "float16", "size": 1, **STATICS}
    function(**good)  # also fills the cache with what equals some of the wrong values
    with pytest.raises(error, match=message):
        function(**(good | change))
