# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The state before every segment of chunks, of what `_ends_kernel` has of each: S -> T·S + E."""

import triton
import triton.language as tl


# Sizes that change from call to call must not key a compile.
@triton.jit(do_not_specialize=["n_segments"])
def gdn_between_kernel(
    ends_ptr, initial_ptr, states_ptr, n_segments,
    H_V: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_SIZE_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ends [B·(n_segments - 1), H_v, K, V + K] and states [B·n_segments, H_v, K, V] in fp32; initial [B,H_v,K,V] of any dtype.

    Transposed, with so few rows of S^T that products are a warp's own: those of a warpgroup take the left operand from shared
    memory or else from registers that they may still read when others write them.
    """
    PARTS: tl.constexpr = V // BLOCK_SIZE_V
    WIDTH: tl.constexpr = V + K
    h = tl.program_id(0) // PARTS % H_V
    n = (tl.program_id(0) // (PARTS * H_V)).to(tl.int64)
    v = (tl.program_id(0) % PARTS * BLOCK_SIZE_V + tl.arange(0, BLOCK_SIZE_V))[:, None]
    i = tl.arange(0, K)[None, :]
    j = tl.arange(0, K)[:, None]
    if initial_ptr is None:
        state = tl.zeros((BLOCK_SIZE_V, K), tl.float32)
    else:
        state = tl.load(initial_ptr + (n * H_V + h) * (K * V) + i * V + v).to(tl.float32)
    states_ptr += (n * n_segments * H_V + h) * (K * V) + i * V + v
    ends_ptr += (n * (n_segments - 1) * H_V + h) * (K * WIDTH) + i * WIDTH
    tl.store(states_ptr, state)
    for _ in tl.range(1, n_segments, num_stages=STAGES):
        T = tl.load(ends_ptr + V + j)
        E = tl.load(ends_ptr + v)
        # Three products of tf32: an error of 2^-21, where the states themselves have 2^-9.
        state = tl.dot(state, T, E, input_precision="tf32x3")
        states_ptr += H_V * K * V
        ends_ptr += H_V * K * WIDTH
        tl.store(states_ptr, state)
