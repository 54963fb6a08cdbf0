"""Tuning tables of `gdn.solve_tril`."""

from ..devices import Device
from ..spec import Knobs, OpSpec, Statics
from . import _ssd

_KNOBS = (_ssd.NUM_WARPS,)


def heuristic(statics: Statics, dtype: str, device: Device, size: int) -> Knobs:
    """A warp for every 8 rows: the products are short and wait for each other."""
    del dtype, device, size
    return {"num_warps": statics["chunk_size"] // 8}


GDN_SOLVE_TRIL = OpSpec(
    name="gdn_solve_tril",
    static_keys=("chunk_size",),
    dtype_key="dtype",
    dtypes=("float32",),
    dtype_aliases={},
    size_key="tokens x value heads",
    knobs=_KNOBS,
    triton_knobs=_KNOBS,
    pallas_knobs=_ssd.pallas_knobs(_KNOBS),
    pallas_rule=_ssd.pallas_rule,
    heuristic=heuristic,
    tuned_at=("T", "H_v"),
    vllm_compatible=False,
)
