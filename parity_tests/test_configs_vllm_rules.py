"""vLLM and this package pick the same launch from the same tables.

`vllm_pick` states vLLM 0.33's rules once more, on its own: nothing of `ssm_configs` is used in it.
"""

import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ssm_configs
from ssm_configs import Device

from .configs_env import DEVICE, OP, STATICS, VLLM_DATA, entry, forget_everything, put_table

SHIPPED = list(ssm_configs.shipped_tables(OP))


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    forget_everything(monkeypatch)


# vLLM's rules


def vllm_file(headdim: int, dstate: int, device: str, dtype: str) -> str:
    if dtype == "bfloat16":
        dtype = "float16"
    return f"headdim={headdim},dstate={dstate},device_name={re.sub(r'[ \s/]+', '_', device)},cache_dtype={dtype}.json"


def vllm_load(folders: list[Path], name: str) -> dict[int, dict] | None:
    for folder in folders:
        if (folder / name).exists():
            table = json.loads((folder / name).read_text())
            if isinstance(table, dict):
                return {int(key): value for key, value in table.items() if key.isdigit()}
    return None


def vllm_pick(
    folders: list[Path], *, headdim: int, dstate: int, device: str, dtype: str, batch: int, nheads: int
) -> tuple[int, int]:
    table = vllm_load(folders, vllm_file(headdim, dstate, device, dtype))
    assert table
    effective_batch = batch * nheads
    nearest = min(table, key=lambda key: abs(key - effective_batch))  # the first in file order, on ties
    return table[nearest]["BLOCK_SIZE_M"], table[nearest]["num_warps"]


def our_pick(*, device: str, dtype: str, batch: int, nheads: int, **statics) -> tuple[int, int]:
    config = ssm_configs.lookup(OP, twin="triton", device=Device(device), dtype=dtype, size=batch * nheads, **statics)
    return config["BLOCK_SIZE_M"], config["num_warps"]


def interesting_sizes(table: dict[int, dict]) -> list[int]:
    """Every key, every middle between two keys, one to either side of each, and both far ends."""
    keys = sorted(table)
    middles = [(low + high) // 2 for low, high in itertools.pairwise(keys)]
    around = {size + step for size in (*keys, *middles) for step in (-1, 0, 1)}
    return sorted(around | {1, 10 * keys[-1]})


# The same choice from the same files


def vllm_tables() -> list[tuple[str, dict]]:
    """vLLM's 34 files as vLLM has them: name and content."""
    files = [(path.name, json.loads(path.read_text())) for path in sorted(VLLM_DATA.glob("*.json"))]
    for table in SHIPPED:
        if table.device_name != "NVIDIA_H200":
            content = json.loads(table.path.read_text(encoding="utf-8"))
            del content["source"]
            files.append((table.path.name, content))
    return files


def test_vllm_has_34_tables():
    assert len({name for name, _ in vllm_tables()}) == 34
    assert {key for _, content in vllm_tables() for key in content if not key.isdigit()} == {"triton_version"}


@pytest.mark.parametrize("variable", ["VLLM_TUNED_CONFIG_FOLDER", "SSM_TUNED_CONFIG_FOLDER"])
@pytest.mark.parametrize("name, content", vllm_tables(), ids=lambda value: value if isinstance(value, str) else "")
def test_vllms_tables_drop_into_a_folder_unchanged(tmp_path, monkeypatch, variable, name, content):
    folder = tmp_path / OP if variable.startswith("SSM") else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content, indent=4))
    monkeypatch.setenv(variable, str(tmp_path))
    statics, device, dtype = ssm_configs.parse_table_file_name(OP, name)
    for size in interesting_sizes({int(key): {} for key in content if key.isdigit()}):
        call = {"device": device, "dtype": dtype, "batch": size, "nheads": 1, **statics}
        assert our_pick(**call) == vllm_pick([folder], **call), size
        config = ssm_configs.lookup(OP, twin="triton", device=Device(device), dtype=dtype, size=size, **statics)
        assert (config.source, config.path) == (variable, str(folder / name))


@pytest.mark.parametrize("table", SHIPPED, ids=lambda table: table.path.stem)
def test_shipped_tables_serve_vllm_with_the_same_choice(table):
    # What vLLM asks for when it runs there: the name in the file must be the one it builds.
    assert table.path.name == vllm_file(**table.statics, device=table.device_name, dtype=table.dtype)
    loaded = vllm_load([table.path.parent], table.path.name)
    assert loaded
    for launch in loaded.values():
        assert type(launch["BLOCK_SIZE_M"]) is int and launch["BLOCK_SIZE_M"] > 0
        assert type(launch["num_warps"]) is int and launch["num_warps"] > 0
    dtypes = ["float16", "bfloat16"] if table.dtype == "float16" else ["float32"]
    for dtype in dtypes:
        for size in interesting_sizes(loaded):
            call = {"device": table.device_name, "dtype": dtype, "batch": size, "nheads": 1, **table.statics}
            assert our_pick(**call) == vllm_pick([table.path.parent], **call), size


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_ascending_table_gives_the_same_choice(tmp_path, monkeypatch, data):
    launches = st.builds(entry, st.sampled_from([1 << i for i in range(11)]), st.sampled_from([1, 2, 4, 8, 16, 32]))
    table = data.draw(st.dictionaries(st.integers(1, 300_000), launches, min_size=1, max_size=12))
    put_table(tmp_path, {"triton_version": "3.6.0", **{str(key): table[key] for key in sorted(table)}})
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    ssm_configs.clear_cache()
    near = st.sampled_from(interesting_sizes(table))
    for batch, nheads in data.draw(st.lists(st.tuples(near | st.integers(1, 4096), st.integers(1, 256)), min_size=1)):
        call = {"device": DEVICE.name, "dtype": "float16", "batch": batch, "nheads": nheads, **STATICS}
        assert our_pick(**call) == vllm_pick([tmp_path], **call)


def test_the_users_folder_comes_before_the_shipped_tables(tmp_path, monkeypatch):
    shipped = next(table for table in SHIPPED if table.device_name == "NVIDIA_H100_80GB_HBM3")
    (tmp_path / shipped.path.name).write_text(json.dumps({"8": entry(1, 32)}))
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    call = {"device": "NVIDIA H100 80GB HBM3", "dtype": shipped.dtype, "batch": 64, "nheads": 8, **STATICS}
    assert our_pick(**call) == vllm_pick([tmp_path, shipped.path.parent], **call) == (1, 32)
