"""The operators that are benchmarked: one module, one declaration each."""

from ..op import BenchOp
from .selective_state_update import SELECTIVE_STATE_UPDATE

OPS: dict[str, BenchOp] = {op.name: op for op in (SELECTIVE_STATE_UPDATE,)}
