"""`ModelDims`: what the operators need to know of a model, and nothing else.

    dims = ModelDims.from_config(hf_config)      # None without such layers
    dims = dims.slice(tp)                        # of one device of tp

Neither torch nor jax nor transformers is needed: a config is an object with attributes or a dict, as `config.json` holds it.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from .contracts._shapes import FLOATS, check_chunk_size, expect_dtype
from .models.families import DTYPE_FIELDS, STATE_DTYPE_FIELD, read_family

# What vLLM takes where a config names no chunk size. The operators accept up to 2048 and cut longer chunks than their own (64
# to 128 tokens) themselves, so nothing here is about what a kernel holds.
DEFAULT_CHUNK_SIZE = 2048


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """Sizes and dtypes of a model's state-space layers on one device. Either half may be absent (all of it 0)."""

    heads: int = 0
    """H of the Mamba-2 layers."""
    groups: int = 0
    """G: of B and C; H % G == 0."""
    headdim: int = 0
    """P."""
    dstate: int = 0
    """N."""
    chunk_size: int = DEFAULT_CHUNK_SIZE
    """L of the Mamba-2 layers: a power of two from 16 to 2048. A gated delta rule's chunk is always 64."""

    key_heads: int = 0
    """H_k of the gated-delta-rule layers."""
    value_heads: int = 0
    """H_v; H_v % H_k == 0."""
    key_dim: int = 0
    """K, of one head, up to 256."""
    value_dim: int = 0
    """V, of one head."""

    conv_width: int = 4
    """W, 2 to 6."""
    conv_bias: bool = True

    dtype: str = "bfloat16"
    """Of activations."""
    parameter_dtype: str = ""
    """Of conv weights and bias, D and dt_bias; `dtype` unless given. A and A_log are fp32, as all models keep them."""
    state_dtype: str = "float32"
    """Of the pools of recurrent states."""
    model: str = ""
    """The config's model_type, for messages."""

    gate: bool = False
    """Whether z goes to the Mamba-2 operators. Models with a norm between scan and gate keep it."""
    qk_l2norm: bool = True
    """Whether the gated-delta-rule operators normalise q and k."""
    gates_in_kernel: bool = True
    """Whether decode computes g and beta from the raw gates, A_log and dt_bias (otherwise they come in fp32)."""

    def __post_init__(self) -> None:
        if not self.parameter_dtype:
            object.__setattr__(self, "parameter_dtype", self.dtype)
        for name in ("dtype", "parameter_dtype", "state_dtype"):
            expect_dtype(name, getattr(self, name), FLOATS)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{field.name}: expected an int, got {value!r} ({type(value).__name__})")
            if field.type in (bool, "bool") and type(value) is not bool:
                raise TypeError(f"{field.name}: expected a bool, got {value!r} ({type(value).__name__})")
        _all_or_none(self, "heads", "groups", "headdim", "dstate")
        _all_or_none(self, "key_heads", "value_heads", "key_dim", "value_dim")
        if not (self.has_mamba or self.has_gdn):
            raise ValueError("heads, key_heads: expected the sizes of at least one kind of layer, got none")
        _divides(self, "groups", "heads")
        _divides(self, "key_heads", "value_heads")
        if not 2 <= self.conv_width <= 6:
            raise ValueError(f"conv_width: expected 2 to 6, got {self.conv_width}")
        if self.key_dim > 256:
            raise ValueError(f"key_dim: expected at most 256, got {self.key_dim}")
        check_chunk_size(self.chunk_size)

    @property
    def has_mamba(self) -> bool:
        return self.heads > 0

    @property
    def has_gdn(self) -> bool:
        return self.key_heads > 0

    @property
    def conv_state_dtype(self) -> str:
        """The convolutions copy inputs into their state bit for bit, so there is one choice only."""
        return self.dtype

    @property
    def mamba_parts(self) -> tuple[int, int, int]:
        """Channels of x, B and C, in the order in which they are convolved."""
        return self.heads * self.headdim, self.groups * self.dstate, self.groups * self.dstate

    @property
    def gdn_parts(self) -> tuple[int, int, int]:
        """Channels of q, k and v."""
        return self.key_heads * self.key_dim, self.key_heads * self.key_dim, self.value_heads * self.value_dim

    def slice(self, tp: int) -> "ModelDims":
        """One of `tp` equal parts of the heads. Groups and key heads that are fewer than `tp` are held by several devices."""
        if isinstance(tp, bool) or not isinstance(tp, int):
            raise TypeError(f"tp: expected an int, got {type(tp).__name__}")
        if tp < 1:
            raise ValueError(f"tp: expected tp >= 1, got {tp}")
        for name in ("heads", "value_heads"):
            if getattr(self, name) % tp:
                raise ValueError(f"tp: expected a divisor of {name}={getattr(self, name)}, got {tp}")
        return replace(
            self,
            heads=self.heads // tp,
            value_heads=self.value_heads // tp,
            groups=_shared(self.groups, tp, "groups"),
            key_heads=_shared(self.key_heads, tp, "key_heads"),
        )

    @classmethod
    def from_config(
        cls, config: Any, *, dtype: str | None = None, state_dtype: str | None = None, **others: Any
    ) -> "ModelDims | None":
        """The dims of a Hugging Face config (an object or a dict) of one of `ssm_configs.models.families.FAMILIES`.

        None where the config is None or, in a model that may go without, it has no such layers.

        Args:
            dtype: of activations; the config's `dtype` or `torch_dtype` without it.
            state_dtype: the config's `mamba_ssm_cache_dtype` without it, else "float32".
            **others: any other field, in the config's place: `gate=True`, say.

        Raises:
            ValueError: the model_type is unknown, or a field is missing or not what it must be.
        """
        if config is None:
            return None
        sizes, config = read_family(config)
        if sizes is None:
            return None
        if dtype is None:
            named = next((value for name in DTYPE_FIELDS if (value := config.get(name)) is not None), None)
            if named is None:
                raise ValueError(
                    f"config: {sizes['model']} has none of the fields {' and '.join(DTYPE_FIELDS)}; pass dtype="
                )
            dtype = _dtype_name(named)
        if state_dtype is None:
            state_dtype = _dtype_name(config.get(STATE_DTYPE_FIELD) or "float32")
            state_dtype = "float32" if state_dtype == "auto" else state_dtype
        if "key_heads" not in sizes:
            sizes.setdefault("chunk_size", DEFAULT_CHUNK_SIZE)
        chosen: dict[str, Any] = sizes | {"dtype": dtype, "state_dtype": state_dtype} | others
        return cls(**chosen)


def _dtype_name(dtype: Any) -> str:
    # str(torch.bfloat16) is "torch.bfloat16".
    return str(dtype).removeprefix("torch.")


def _all_or_none(dims: ModelDims, *names: str) -> None:
    values = {name: getattr(dims, name) for name in names}
    if any(values.values()) and min(values.values()) < 1:
        raise ValueError(f"{min(values, key=lambda name: values[name])}: expected at least 1 of each, got {values}")


def _divides(dims: ModelDims, part: str, whole: str) -> None:
    if getattr(dims, part) and getattr(dims, whole) % getattr(dims, part):
        raise ValueError(f"{whole}: expected a multiple of {part}={getattr(dims, part)}, got {getattr(dims, whole)}")


def _shared(count: int, tp: int, name: str) -> int:
    if count % tp == 0:
        return count // tp
    if tp % count == 0:
        return 1
    raise ValueError(f"tp: expected a divisor or a multiple of {name}={count}, got {tp}")
