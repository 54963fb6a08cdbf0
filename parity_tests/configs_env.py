"""What the tests of `ssm_configs` share: a clean start, and tables to put in folders."""

import json
from pathlib import Path
from typing import Any

import pytest

import ssm_configs

OP = "selective_state_update"
SPEC = ssm_configs.SPECS[OP]
STATICS = {"headdim": 64, "dstate": 128}
DEVICE = ssm_configs.Device("Some Accelerator 80GB", (9, 0))
H100 = ssm_configs.Device("NVIDIA H100 80GB HBM3", (9, 0))

# vLLM's own H200 tables: the shipped ones are measured here, and vLLM's stay as test data.
VLLM_DATA = Path(__file__).parent / "data" / "vllm_tables" / OP


def forget_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folders from the environment, nothing cached, nothing warned of."""
    monkeypatch.delenv("SSM_TUNED_CONFIG_FOLDER", raising=False)
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    ssm_configs.clear_cache()


def entry(rows: Any, warps: Any, **more: Any) -> dict[str, Any]:
    """A table entry; the values need not be legal."""
    return {"BLOCK_SIZE_M": rows, "num_warps": warps, **more}


def put_table(folder: Path, table: Any, *, device_name: str = DEVICE.table_name, dtype: str = "float16") -> Path:
    """Write `table` (any JSON value, or text as it is) under the name that `OP` with `STATICS` looks for."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"headdim=64,dstate=128,device_name={device_name},cache_dtype={dtype}.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table, indent=4), encoding="utf-8")
    return path


def lookup(size: int, *, twin: str = "triton", device=DEVICE, dtype: str = "float16") -> ssm_configs.Config:
    return ssm_configs.lookup(OP, twin=twin, device=device, dtype=dtype, size=size, **STATICS)


def explain(size: int, *, twin: str = "triton", device=DEVICE, dtype: str = "float16") -> ssm_configs.Explanation:
    return ssm_configs.explain(OP, twin=twin, device=device, dtype=dtype, size=size, **STATICS)
