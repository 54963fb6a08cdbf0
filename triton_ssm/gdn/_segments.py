"""Long sequences of few heads in segments of chunks: the launches that find the state before every segment.

What a segment does to a state is linear, S -> T·S + E. `_ends_kernel` has T and E of all segments but the last at the same
time, `_between_kernel` the states, in fp32, and with those `_loop_kernel` runs all segments as if they were sequences.

Nothing is left out, and rounding to q's dtype has the same say in T as in a state. T begins with ones: where gates grow so much
within one segment that T leaves the range of q's dtype, which h is rounded to, or of fp32, results are infinite or NaN. Without
segments they are so where the state itself leaves it, a little later where v and the initial state are tiny.
"""

from collections.abc import Hashable

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ssm_configs.contracts.gdn import Dims
from ssm_configs.contracts.gdn_segments import segment_chunks

from .._plans import Launcher
from ._between_kernel import gdn_between_kernel
from ._ends_kernel import COLUMNS as _COLUMNS
from ._ends_kernel import gdn_ends_kernel_hopper
from ._prepare import CHUNK

# Chunks that are in shared memory at the same time: all of Hopper's but 64 KiB.
_STAGES = 4
# Columns of v of a program of the second kernel, warps of it, and segments whose T is asked for at the same time.
_BLOCK_SIZE_V, _WARPS, _AHEAD = 16, 8, 3
_ENDS = Launcher(gdn_ends_kernel_hopper)
_BETWEEN = Launcher(gdn_between_kernel)


def chunks_of(dims: Dims, sms: int) -> int:
    """Chunks of a segment; all that a sequence has where it stays whole."""
    return dims.NC if dims.packed else segment_chunks(dims.B, dims.H_v, dims.K, dims.V, dims.NC, sms)


def fewest_tokens(H_v: int, K: int, V: int, most: int, sms: int) -> int | None:
    """Of a sequence in segments; None where none of `most` tokens is."""
    # More sequences are never cut where one that long is not.
    found = (n for n in range(1, -(-most // CHUNK) + 1) if segment_chunks(1, H_v, K, V, n, sms) < n)
    chunks = next(found, None)
    return None if chunks is None else (chunks - 1) * CHUNK + 1


def states_before(
    key: Hashable, dims: Dims, length: int, k: TensorDescriptor, v: TensorDescriptor, Y: TensorDescriptor,
    gates: TensorDescriptor, initial: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """[B·segments, H_v, K, V] in fp32, of segments of `length` chunks."""
    B, H_v, K, V = dims.B, dims.H_v, dims.K, dims.V
    segments = -(-dims.NC // length)
    device = gates.base.device
    ends = torch.empty(B * (segments - 1), H_v, K, V + K, dtype=torch.float32, device=device)
    states = torch.empty(B * segments, H_v, K, V, dtype=torch.float32, device=device)
    _ENDS(
        key, (B * (segments - 1) * H_v * ((V + K) // _COLUMNS.value), 1, 1),
        (ends, k, v, Y, gates, dims.T, dims.NC, segments, length),
        (dims.H_k, H_v, K, V, _STAGES), 4,
    )  # fmt: skip
    _BETWEEN(
        key, (B * H_v * (V // _BLOCK_SIZE_V), 1, 1), (ends, initial, states, segments),
        (H_v, K, V, _BLOCK_SIZE_V, _AHEAD), _WARPS,
    )  # fmt: skip
    return states
