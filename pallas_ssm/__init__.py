"""JAX state-space operators: Mosaic GPU kernels with an XLA form beside each; the twin of `triton_ssm`."""

from ssm_configs import override as override

from . import layouts as layouts
from ._explain import explain as explain
from .bucket import bucket as bucket
from .selective_state_update import selective_state_update as selective_state_update

__all__ = ["bucket", "explain", "layouts", "override", "selective_state_update"]
