"""Where each model family's Hugging Face config keeps the sizes of its layers."""

from collections.abc import Mapping
from typing import Any

DTYPE_FIELDS = ("dtype", "torch_dtype")
STATE_DTYPE_FIELD = "mamba_ssm_cache_dtype"
CHUNK_FIELDS = ("mamba_chunk_size", "chunk_size")

# Of a field of ModelDims, the names that it has in the config; the first one found counts.
Fields = Mapping[str, tuple[str, ...]]

_MAMBA2: Fields = {
    "heads": ("num_heads",),
    "headdim": ("head_dim",),
    "dstate": ("state_size",),
    "groups": ("n_groups",),
    "conv_width": ("conv_kernel",),
    "conv_bias": ("use_conv_bias",),
}
_NEMOTRON_H: Fields = {
    "heads": ("mamba_num_heads",),
    "headdim": ("mamba_head_dim",),
    "dstate": ("ssm_state_size",),
    "groups": ("n_groups", "mamba_n_groups"),
    "conv_width": ("conv_kernel", "mamba_d_conv"),
    "conv_bias": ("use_conv_bias", "mamba_conv_bias"),
}
# Bamba's names, which Granite 4 and Falcon-H1 took over.
_BAMBA: Fields = {
    "heads": ("mamba_n_heads",),
    "headdim": ("mamba_d_head",),
    "dstate": ("mamba_d_state",),
    "groups": ("mamba_n_groups",),
    "conv_width": ("mamba_d_conv",),
    "conv_bias": ("mamba_conv_bias",),
}
_ZAMBA2: Fields = {
    "heads": ("n_mamba_heads",),
    "headdim": ("mamba_headdim",),
    "dstate": ("mamba_d_state",),
    "groups": ("mamba_ngroups",),
    "conv_width": ("mamba_d_conv",),
    "conv_bias": ("use_conv_bias",),
}
_QWEN: Fields = {
    "key_heads": ("linear_num_key_heads",),
    "value_heads": ("linear_num_value_heads",),
    "key_dim": ("linear_key_head_dim",),
    "value_dim": ("linear_value_head_dim",),
    "conv_width": ("linear_conv_kernel_dim",),
}

FAMILIES: Mapping[str, Fields] = {
    "mamba2": _MAMBA2,
    "nemotron_h": _NEMOTRON_H,
    "bamba": _BAMBA,
    "granitemoehybrid": _BAMBA,
    "falcon_h1": _BAMBA,
    "zamba2": _ZAMBA2,
    "qwen3_next": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_text": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen3_5_moe_text": _QWEN,
}

# Fields that a config may leave out, as its class has a default; a size it never may.
_DEFAULTS: Mapping[str, Any] = {"conv_bias": True}


class Config(Mapping[str, Any]):
    """A config's fields by name, whichever kind of object it is. A field that is None counts as absent."""

    def __init__(self, config: Any) -> None:
        self._fields = dict(config) if isinstance(config, Mapping) else None
        self._config = config

    def __getitem__(self, name: str) -> Any:
        value = getattr(self._config, name, None) if self._fields is None else self._fields.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self):
        return iter(vars(self._config) if self._fields is None else self._fields)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def read_family(config: Any) -> tuple[dict[str, Any] | None, Config]:
    """(fields of ModelDims, the config they come from); None for a hybrid that was configured without such layers."""
    config = Config(config)
    # A model for text and images keeps the text model's config within its own.
    if "text_config" in config:
        config = Config(config["text_config"])
    model = config.get("model_type")
    if model not in FAMILIES:
        raise ValueError(f"config: expected a model_type of {', '.join(FAMILIES)}, got {model!r}")
    if _without_layers(config):
        return None, config
    fields = FAMILIES[model]
    sizes: dict[str, Any] = {"model": model}
    for field, names in fields.items():
        value = next((config[name] for name in names if name in config), None)
        if field == "headdim" and value in (None, "auto"):
            value = _head_dim(config, model, names[0], sizes["heads"])
        if value is None and field not in _DEFAULTS:
            raise ValueError(f"config: {model} has no field {' or '.join(names)}")
        sizes[field] = _DEFAULTS[field] if value is None else value
        if field != "conv_bias" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"config: {model}: {' or '.join(names)}: expected a positive int, got {value!r}")
    if "key_heads" in fields:
        sizes["conv_bias"] = False
    elif (chunk := next((config[name] for name in CHUNK_FIELDS if name in config), None)) is not None:
        sizes["chunk_size"] = chunk
    return sizes, config


def _without_layers(config: Config) -> bool:
    # Granite 4 comes as a pure transformer, too, under the same model_type.
    kinds = config.get("layer_types")
    return (
        config["model_type"] == "granitemoehybrid"
        and isinstance(kinds, list | tuple)
        and bool(kinds)
        and not any(kind in ("mamba", "linear_attention") for kind in kinds)
    )


def _head_dim(config: Config, model: str, name: str, heads: int) -> int:
    """ "auto", and what Zamba2 works out: the inner width over the heads."""
    if model in ("mamba2", "nemotron_h"):
        raise ValueError(f"config: {model} has no field {name}")
    if "mamba_d_ssm" in config:
        inner = config["mamba_d_ssm"]
    elif "mamba_expand" in config and "hidden_size" in config:
        inner = int(config["mamba_expand"] * config["hidden_size"])
    else:
        raise ValueError(f"config: {model} has no field {name}, nor mamba_expand and hidden_size to work it out from")
    if inner % heads:
        raise ValueError(f"config: {model}: {name}: expected an inner width that {heads} heads divide, got {inner}")
    return inner // heads
