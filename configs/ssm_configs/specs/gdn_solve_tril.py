"""Tuning tables of `gdn.solve_tril`."""

from collections.abc import Mapping

from ..devices import Device
from ..spec import Knob, Knobs, OpSpec, Statics, Value
from . import _ssd

_KNOBS = (_ssd.NUM_WARPS, Knob("use_tma", bool, "A read by the tensor memory accelerator, on devices that have one"))


def pallas_rule(shared: Mapping[str, Value], statics: Statics) -> Knobs:
    """There is no Mosaic GPU kernel of it to launch."""
    del shared, statics  # part of every rule's signature
    return {}


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """A warp for every 16 rows, the least that a product takes."""
    del dtype, device, size
    return {"num_warps": statics["chunk_size"] // 16, "use_tma": False}


GDN_SOLVE_TRIL = OpSpec(
    name="gdn_solve_tril",
    static_keys=("chunk_size",),
    dtype_key="dtype",
    dtypes=("float32",),
    dtype_aliases={},
    size_key="tokens x value heads",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=(),
    pallas_rule=pallas_rule,
    heuristic=heuristic,
    tuned_at=("T", "H_v"),
    vllm_compatible=False,
)
