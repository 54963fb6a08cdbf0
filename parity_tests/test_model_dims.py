"""`ModelDims` from the configs of the families that have such layers, and the launch configs that a model reaches."""

import dataclasses
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

import ssm_configs
from ssm_configs.model_dims import ModelDims
from ssm_configs.models.families import FAMILIES
from ssm_configs.models.sizes import reached_configs

from . import configs_env

# The fields of published config.json files that matter here, and the dims that they come to.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Mamba2-2.7B": (
        {"model_type": "mamba2", "num_heads": 80, "head_dim": 64, "state_size": 128, "n_groups": 1, "conv_kernel": 4,
         "chunk_size": 256, "use_conv_bias": True, "torch_dtype": "float16"},
        {"heads": 80, "headdim": 64, "dstate": 128, "groups": 1, "chunk_size": 256, "dtype": "float16"},
    ),
    "Nemotron-H-8B": (
        {"model_type": "nemotron_h", "mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
         "conv_kernel": 4, "chunk_size": 128, "use_conv_bias": True, "torch_dtype": "bfloat16",
         "mamba_ssm_cache_dtype": "float32", "num_attention_heads": 32, "head_dim": 128},
        {"heads": 128, "headdim": 64, "dstate": 128, "groups": 8, "chunk_size": 128, "state_dtype": "float32"},
    ),
    "Bamba-9B": (
        {"model_type": "bamba", "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1,
         "mamba_d_conv": 4, "mamba_chunk_size": 256, "mamba_conv_bias": True, "dtype": "bfloat16"},
        {"heads": 128, "headdim": 64, "dstate": 128, "groups": 1, "chunk_size": 256},
    ),
    "Granite-4": (
        {"model_type": "granitemoehybrid", "mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_expand": 2, "hidden_size": 4096,
         "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_chunk_size": 256, "torch_dtype": "bfloat16",
         "layer_types": ["mamba", "attention"]},
        {"heads": 128, "headdim": 64, "dstate": 128, "groups": 1, "conv_bias": True},
    ),
    "Falcon-H1": (
        {"model_type": "falcon_h1", "mamba_n_heads": 24, "mamba_d_head": None, "mamba_d_ssm": 1536, "mamba_d_state": 256,
         "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_chunk_size": 128, "mamba_conv_bias": True, "torch_dtype": "bfloat16",
         "hidden_size": 2048, "mamba_expand": 2},
        {"heads": 24, "headdim": 64, "dstate": 256, "groups": 1, "chunk_size": 128},
    ),
    "Zamba2": (
        {"model_type": "zamba2", "n_mamba_heads": 80, "mamba_expand": 2, "hidden_size": 2560, "mamba_d_state": 64,
         "mamba_ngroups": 1, "mamba_d_conv": 4, "chunk_size": 256, "use_conv_bias": True, "torch_dtype": "bfloat16"},
        {"heads": 80, "headdim": 64, "dstate": 64, "groups": 1, "chunk_size": 256},
    ),
    "Qwen3-Next": (
        {"model_type": "qwen3_next", "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
         "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "torch_dtype": "bfloat16"},
        {"key_heads": 16, "value_heads": 32, "key_dim": 128, "value_dim": 128, "conv_bias": False, "heads": 0},
    ),
}  # fmt: skip


def changed(name: str, **changes: Any) -> dict[str, Any]:
    """That config with fields changed, or without those that are None."""
    config = PUBLISHED[name][0] | changes
    return {key: value for key, value in config.items() if key not in changes or changes[key] is not None}


def read(config: Any, **options: Any) -> ModelDims:
    dims = ModelDims.from_config(config, **options)
    assert dims is not None
    return dims


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("kind", (dict, lambda config: SimpleNamespace(**config)), ids=("dict", "object"))
def test_published_configs(name, kind):
    config, expected = PUBLISHED[name]
    dims = read(kind(config))
    assert {field: getattr(dims, field) for field in expected} == expected
    assert dims.conv_width == 4 and dims.model == config["model_type"] and dims.conv_state_dtype == dims.dtype


def test_every_family_is_among_them():
    assert {config["model_type"] for config, _ in PUBLISHED.values()} == {
        family for family in FAMILIES if not family.startswith("qwen3_5")
    }


def test_a_text_model_within_another():
    text = changed("Qwen3-Next", model_type="qwen3_5_text")
    dims = read({"model_type": "qwen3_5", "text_config": text})
    assert dims.value_heads == 32 and dims.model == "qwen3_5_text"


def test_chunk_size_falls_back():
    assert read(changed("Bamba-9B", chunk_size=64)).chunk_size == 256
    assert read(changed("Bamba-9B", mamba_chunk_size=None, chunk_size=64)).chunk_size == 64
    assert read(changed("Bamba-9B", mamba_chunk_size=None)).chunk_size == 2048
    with pytest.raises(ValueError, match="chunk_size: expected a power of two from 16 to 2048, got 4096"):
        read(changed("Bamba-9B", mamba_chunk_size=4096))


def test_dtypes():
    class Dtype:  # as torch's print themselves
        def __str__(self) -> str:
            return "torch.float16"

    assert read(changed("Bamba-9B", dtype=Dtype())).dtype == "float16"
    dims = read(PUBLISHED["Bamba-9B"][0], dtype="float32", state_dtype="bfloat16", gate=True)
    assert (dims.dtype, dims.parameter_dtype, dims.state_dtype, dims.gate) == ("float32", "float32", "bfloat16", True)
    assert read(changed("Nemotron-H-8B", mamba_ssm_cache_dtype="float16")).state_dtype == "float16"
    assert read(changed("Nemotron-H-8B", mamba_ssm_cache_dtype="auto")).state_dtype == "float32"
    with pytest.raises(ValueError, match="bamba has none of the fields dtype and torch_dtype; pass dtype="):
        read(changed("Bamba-9B", dtype=None))


def test_nothing_to_read():
    assert ModelDims.from_config(None) is None
    assert ModelDims.from_config(changed("Granite-4", layer_types=["attention"])) is None


@pytest.mark.parametrize(
    ("config", "text"),
    (
        ({"model_type": "llama"}, "config: expected a model_type of mamba2, .*, got 'llama'"),
        ({}, "config: expected a model_type of .*, got None"),
        (changed("Mamba2-2.7B", head_dim=None), "mamba2 has no field head_dim"),
        (changed("Nemotron-H-8B", n_groups=None), "nemotron_h has no field n_groups or mamba_n_groups"),
        (changed("Granite-4", mamba_expand=None), "granitemoehybrid has no field mamba_d_head, nor mamba_expand"),
        (changed("Granite-4", mamba_n_heads=100), "mamba_d_head: expected an inner width that 100 heads divide, got 8192"),
        (changed("Qwen3-Next", linear_key_head_dim=None), "qwen3_next has no field linear_key_head_dim"),
        (changed("Zamba2", n_mamba_heads="80"), "n_mamba_heads: expected a positive int, got '80'"),
        (changed("Qwen3-Next", linear_key_head_dim=512), "key_dim: expected at most 256, got 512"),
        (changed("Nemotron-H-8B", n_groups=7), "heads: expected a multiple of groups=7, got 128"),
    ),
)  # fmt: skip
def test_what_cannot_be_read_is_named(config, text):
    with pytest.raises(ValueError, match=text):
        read(config)


def test_slices():
    dims = read(PUBLISHED["Nemotron-H-8B"][0])
    assert dims.slice(1) == dims
    assert dims.slice(8) == dataclasses.replace(dims, heads=16, groups=1)
    assert dims.slice(16).groups == 1 and dims.slice(16).mamba_parts == (512, 128, 128)
    qwen = read(PUBLISHED["Qwen3-Next"][0])
    assert qwen.slice(4).gdn_parts == (512, 512, 1024)
    with pytest.raises(ValueError, match="tp: expected a divisor of heads=128, got 3"):
        dims.slice(3)
    with pytest.raises(ValueError, match="tp: expected a divisor or a multiple of groups=8, got 12"):
        dataclasses.replace(dims, heads=96).slice(12)
    with pytest.raises(TypeError, match="tp: expected an int, got float"):
        dims.slice(2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    (
        ({}, ValueError, "expected the sizes of at least one kind of layer"),
        ({"heads": 4}, ValueError, "groups: expected at least 1 of each"),
        ({"heads": 4.0, "groups": 1, "headdim": 64, "dstate": 64}, TypeError, r"heads: expected an int, got 4.0 \(float\)"),
        ({"heads": 4, "groups": 1, "headdim": 64, "dstate": 64, "dtype": "int8"}, TypeError, "dtype: expected dtype"),
        ({"heads": 4, "groups": 1, "headdim": 64, "dstate": 64, "conv_width": 7}, ValueError, "conv_width: expected 2 to 6"),
        ({"heads": 4, "groups": 1, "headdim": 64, "dstate": 64, "gate": 1}, TypeError, "gate: expected a bool"),
    ),
)  # fmt: skip
def test_illegal_dims(fields, error, text):
    with pytest.raises(error, match=text):
        ModelDims(**fields)


@pytest.mark.parametrize(
    ("op", "dtype", "unit", "most", "static"),
    (
        ("selective_state_update", "float32", 80, 300, {"headdim": 64, "dstate": 128}),
        ("causal_conv1d", "bfloat16", 1536, 3000, {"width": 4}),
        ("causal_conv1d_update", "float32", 5120, 300, {"width": 4}),
        ("mamba_chunk_scan_combined", "bfloat16", 1, 3000, {"nheads": 24, "headdim": 64, "dstate": 128}),
        ("chunk_gated_delta_rule", "bfloat16", 8, 300, {"K": 128, "V": 128, "chunk_size": 64}),
    ),
)
@pytest.mark.parametrize("twin", ("triton", "pallas"))
def test_every_config_is_found(op, dtype, unit, most, static, twin, monkeypatch):
    configs_env.forget_everything(monkeypatch)
    request = {"twin": twin, "device": ssm_configs.Device("NVIDIA H200", (9, 0)), "dtype": dtype, **static}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ssm_configs.TableWarning)
        found = reached_configs(op, unit=unit, most=most, **request)
        asked: dict[ssm_configs.Config, list[int]] = {}
        for count in range(1, most + 1):
            asked.setdefault(ssm_configs.lookup(op, size=count * unit, **request), []).append(count)
    assert set(found) == set(asked)
    for config, counts in found.items():
        assert counts[0] - asked[config][0] < 64 and asked[config][-1] - counts[-1] < 64
