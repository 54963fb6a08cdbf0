"""Checks a call of a gated-delta-rule operator and chooses what runs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ssm_configs.contracts import gdn as contract
from ssm_configs.contracts._shapes import FLOATS, expect_dtype

from .. import _arguments
from .._device import Target, target
from .._overrides import check_override
from .._selective_state_update_launch import Unsupported, check_device
from ._call import Floats, Static
from ._vjp import KERNELS, call

Implementation = Literal["mosaic_gpu", "xla"]
Precision = Literal["ieee", "tf32"]

IMPLEMENTATIONS = ("mosaic_gpu", "xla")
COMBINED = "chunk_gated_delta_rule"


class Prepared(NamedTuple):
    """A checked call. The arrays are as they came; `operands` makes them what the implementations take."""

    static: Static
    arrays: Mapping[str, Any]

    @property
    def op(self) -> str:
        """As `explain` and the errors know it."""
        return self.static.op if self.static.op == COMBINED else f"gdn.{self.static.op}"

    def operands(self) -> tuple[Floats, jax.Array | None]:
        floats = {name: jnp.asarray(array) for name, array in self.arrays.items() if name != "cu_seqlens"}
        return floats, _arguments.index_array(self.arrays.get("cu_seqlens"))


@dataclass(frozen=True)
class Choice:
    implementation: str
    reason: str
    target: Target
    launch: Any = None
    """How the kernel is launched; None for XLA."""
    request: Mapping[str, Any] | None = None
    """What the tuning tables were asked; None where no kernel that has any was tried."""


class Op(NamedTuple):
    check: Callable[..., contract.Dims]
    required: tuple[str, ...]
    chunk_size: bool = True
    """Whether the check takes one."""


OPS = {
    "chunk_local_cumsum": Op(contract.check_chunk_local_cumsum, ("g",)),
    "chunk_scaled_dot_kkt": Op(contract.check_chunk_scaled_dot_kkt, ("k", "beta")),
    "solve_tril": Op(contract.check_solve_tril, ("A",), chunk_size=False),
    "recompute_w_u": Op(contract.check_recompute_w_u, ("k", "v", "beta", "A"), chunk_size=False),
    "chunk_delta_h": Op(contract.check_chunk_delta_h, ("k", "w", "u")),
    "chunk_o": Op(contract.check_chunk_o, ("q", "k", "v", "h")),
    COMBINED: Op(contract.check_combined, ("q", "k", "v", "g", "beta")),
}


def prepare(
    name: str,
    *,
    kinds: tuple[type, ...] = _arguments.ARRAYS,
    chunk_size: Any = 64,
    cu_seqlens: Any = None,
    precision: Any = "ieee",
    gate_base: Any = "e",
    scale: Any = None,
    state_layout: Any = "KV",
    out_dtype: Any = jnp.float32,
    use_qk_l2norm: Any = False,
    return_final_state: Any = True,
    **arrays: Any,
) -> Prepared:
    """Checks a call; options that the operator does not have stay at their defaults. `kinds`: what may stand for an array."""
    op = OPS[name]
    given = _arguments.check_arrays(arrays | {"cu_seqlens": cu_seqlens}, kinds)
    for required in op.required:
        if required not in given:
            raise TypeError(f"{required}: expected an array, got None")
    layout = contract.check_state_layout(state_layout)
    options = {"chunk_size": chunk_size} if op.chunk_size else {}
    if name == "chunk_o":
        options["state_layout"] = layout
    dims = op.check(
        *_arguments.shapes_and_dtypes(given),
        **options,
    )
    _arguments.check_slot_values(given, dims, ())
    static = Static(
        name,
        dims,
        precision=contract.check_precision(precision),
        scale=contract.check_scale(scale, dims.K) if dims.K else 1.0,
        gate_base=contract.check_gate_base(gate_base),
        state_layout=layout,
        out_dtype=_dtype("out_dtype", out_dtype),
        use_qk_l2norm=contract.check_flag("use_qk_l2norm", use_qk_l2norm),
        return_final_state=contract.check_flag("return_final_state", return_final_state),
    )
    return Prepared(static, given)


def _dtype(name: str, dtype: Any) -> str:
    try:
        found = jnp.dtype(dtype).name
    except TypeError:
        raise TypeError(f"{name}: expected a dtype, got {dtype!r}") from None
    expect_dtype(name, found, FLOATS)
    return found


def check_implementation(implementation: Any) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {IMPLEMENTATIONS} or None, got {implementation!r}")


def choose(prepared: Prepared, implementation: str | None) -> Choice:
    """Which implementation runs the call; `Unsupported` where it was asked for and cannot."""
    check_implementation(implementation)
    check_override()
    op, static, where = prepared.op, prepared.static, target(prepared.arrays.values())
    if implementation == "xla":
        return Choice("xla", "asked for", where)
    try:
        device = check_device(where, op)
        dims = static.dims
        if dims.B == 0 or dims.T == 0 or dims.N_seq == 0:
            return Choice("xla", "there is no token", where)
        if static.op not in KERNELS:
            raise Unsupported(f"{op}: there is no mosaic_gpu kernel of this operator; use implementation='xla' or None")
        launch = KERNELS[static.op].plan(static, prepared.arrays, device)
    except Unsupported as error:
        if implementation is not None:
            raise
        return Choice("xla", str(error).removeprefix(f"{op}: "), where)
    reason = "asked for" if implementation else f"the kernel takes this call on {device.name}"
    return Choice("mosaic_gpu", reason, where, launch)


def run(prepared: Prepared, implementation: str | None) -> Any:
    choice = choose(prepared, implementation)
    return call(prepared.static, choice.launch, implementation is None, *prepared.operands())
