"""Checks a call of the SSD operators and chooses what runs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

import ssm_configs
from ssm_configs.contracts import ssd as contract

from .. import _arguments
from .._device import Target, target
from .._overrides import check_override
from .._selective_state_update_launch import Unsupported, check_device
from . import _call, _combined_call, _fused, _staged, _stages
from ._vjp import call

Implementation = Literal["mosaic_gpu", "xla"]

IMPLEMENTATIONS = ("mosaic_gpu", "xla")
COMBINED = "mamba_chunk_scan_combined"
# The tensor core's instructions that the kernels are written in.
CAPABILITY = (9, 0)

Static = _call.Static | _combined_call.Static

_CHECKS: Mapping[str, tuple[tuple[str, ...], int, Callable[..., contract.Dims]]] = {
    "chunk_cumsum": (contract.CHUNK_CUMSUM, 2, contract.check_chunk_cumsum),
    "chunk_state": (contract.CHUNK_STATE, 4, contract.check_chunk_state),
    "state_passing": (contract.STATE_PASSING, 2, contract.check_state_passing),
    "bmm_chunk": (contract.BMM_CHUNK, 2, contract.check_bmm_chunk),
    "chunk_scan": (contract.CHUNK_SCAN, 6, contract.check_chunk_scan),
}
_TORCH_ONLY = ("final_states_out", "final_state_indices")


class Prepared(NamedTuple):
    """A checked call. The arrays are as they came, by name."""

    op: str
    """As `explain` knows it."""
    static: Static
    arrays: Mapping[str, Any]

    def operands(self) -> tuple[Any, Any]:
        """(floats, integers) as the implementations take them."""
        cu_seqlens = _arguments.index_array(self.arrays.get("cu_seqlens"))
        floats = {name: jnp.asarray(array) for name, array in self.arrays.items() if name != "cu_seqlens"}
        if isinstance(self.static, _call.Static):
            return floats, cu_seqlens
        named: dict[str, Any] = {name: floats.get(name) for name in _combined_call.Floats._fields}
        return _combined_call.Floats(**named), _combined_call.Integers(cu_seqlens)


@dataclass(frozen=True)
class Choice:
    implementation: str
    reason: str
    target: Target
    launch: Any = None
    """How the kernel is launched; None for XLA."""
    request: Mapping[str, Any] | None = None
    """What the tuning tables were asked; None where no kernel that has any was tried."""


def prepare_stage(
    op: str,
    *,
    kinds: tuple[type, ...] = _arguments.ARRAYS,
    chunk_size: Any = None,
    dt_softplus: Any = False,
    dt_limit: Any = (0.0, float("inf")),
    precision: Any = "ieee",
    state_dtype: Any = jnp.float32,
    **arrays: Any,
) -> Prepared:
    """Checks a call of a stage. `kinds`: what may stand for an array."""
    names, required, check = _CHECKS[op]
    given = _check_arrays({name: arrays[name] for name in names if name in arrays}, names[:required], kinds)
    options = {"chunk_size": chunk_size} if op in ("chunk_cumsum", "bmm_chunk") else {}
    dims = check(*_arguments.shapes_and_dtypes(given), **options)
    if op == "state_passing":
        if dims.packed and dims.NC < dims.N_seq:
            raise ValueError(f"states: expected a chunk slot for each of {dims.N_seq} sequences, got NC={dims.NC}")
        T = (dims.NC - dims.N_seq + 1) * dims.L - 1 if dims.packed else dims.NC * dims.L
        dims = replace(dims, T=T)
    static = _call.Static(
        op,
        dims,
        jnp.dtype(given["x" if "x" in given else names[0]].dtype).name,
        contract.check_precision(precision),
        contract.check_flag("dt_softplus", dt_softplus),
        contract.check_dt_limit(dt_limit),
        _state_dtype(state_dtype),
    )
    _arguments.check_slot_values(given, dims, ())
    return Prepared(f"ssd.{op}", static, given)


def prepare_combined(
    *,
    kinds: tuple[type, ...] = _arguments.ARRAYS,
    chunk_size: Any,
    dt_softplus: Any = False,
    dt_limit: Any = (0.0, float("inf")),
    state_dtype: Any = jnp.float32,
    return_final_states: Any = False,
    return_intermediate_states: Any = False,
    chunk_aligned: Any = False,
    precision: Any = "ieee",
    **arrays: Any,
) -> Prepared:
    """Checks a call of `mamba_chunk_scan_combined`. `kinds`: what may stand for an array."""
    names = [name for name in contract.COMBINED if name not in _TORCH_ONLY]
    given = _check_arrays({name: arrays[name] for name in names if name in arrays}, names[:5], kinds)
    flags = {
        "dt_softplus": dt_softplus,
        "chunk_aligned": chunk_aligned,
        "return_final_states": return_final_states,
        "return_intermediate_states": return_intermediate_states,
    }
    for name, value in flags.items():
        contract.check_flag(name, value)
    dims = contract.check_combined(
        *_arguments.shapes_and_dtypes(given), chunk_size=chunk_size, chunk_aligned=chunk_aligned
    )
    static = _combined_call.Static(
        dims=dims,
        dtype=jnp.dtype(given["x"].dtype).name,
        state_dtype=_state_dtype(state_dtype),
        dt_limit=contract.check_dt_limit(dt_limit),
        precision=contract.check_precision(precision),
        **flags,
    )
    _arguments.check_slot_values(given, dims, ())
    return Prepared(COMBINED, static, given)


def choose(prepared: Prepared, implementation: str | None) -> Choice:
    """Which implementation runs the call; `Unsupported` where it was asked for and cannot."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {IMPLEMENTATIONS} or None, got {implementation!r}")
    check_override()
    op, static, where = prepared.op, prepared.static, target(prepared.arrays.values())
    if implementation == "xla":
        return Choice("xla", "asked for", where)
    request = None
    try:
        device = check_device(where, op)
        if device.capability != CAPABILITY:
            raise Unsupported(f"{op}: the mosaic_gpu kernel needs compute capability 9.0, got {device.capability}")
        if static.dims.B == 0 or static.dims.T == 0 or static.dims.N_seq == 0:
            return Choice("xla", "there is no token", where)
        if isinstance(static, _call.Static):
            launch = _stages.plan(static)
        else:
            request = config_request(static, device)
            launch = _plan_combined(static, device, ssm_configs.lookup(COMBINED, **request))
    except Unsupported as error:
        if implementation is not None:
            raise
        return Choice("xla", str(error).removeprefix(f"{op}: "), where, request=request)
    reason = "asked for" if implementation else f"the kernel takes this call on {device.name}"
    return Choice("mosaic_gpu", reason, where, launch, request)


def config_request(static: _combined_call.Static, device: Any) -> dict[str, Any]:
    """What `ssm_configs.lookup` and `explain` are asked."""
    dims = static.dims
    return {
        "twin": "pallas", "device": device, "dtype": static.dtype, "size": dims.B * dims.T,
        "nheads": dims.H, "headdim": dims.P, "dstate": dims.N,
    }  # fmt: skip


def _plan_combined(static: _combined_call.Static, device: Any, config: Mapping[str, Any]) -> Any:
    """The fused path where the table has it, else the stages one after another."""
    if static.dtype == "float32":
        raise Unsupported(f"{COMBINED}: the mosaic_gpu kernels take 16-bit inputs, got float32")
    if not config["FUSED"]:
        return _staged.plan(static)
    try:
        return _fused.plan(static, device, dict(config))
    except Unsupported as fused:
        try:
            return _staged.plan(static)
        except Unsupported:
            raise fused from None


def _check_arrays(arrays: Mapping[str, Any], required: Any, kinds: tuple[type, ...]) -> dict[str, Any]:
    given = _arguments.check_arrays(arrays, kinds)
    for name in required:
        if name not in given:
            raise TypeError(f"{name}: expected an array, got None")
    return given


def _state_dtype(dtype: Any) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        raise TypeError(f"state_dtype: expected a dtype, got {dtype!r}") from None
    return contract.check_state_dtype(name)


def run(prepared: Prepared, implementation: str | None) -> Any:
    choice = choose(prepared, implementation)
    return call(prepared.static, choice.launch, implementation is None, *prepared.operands())
