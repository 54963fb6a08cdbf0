"""The inverse (I + A)^-1 of each chunk's strictly lower triangle.

fp32 throughout, whatever the matrix: forward substitution on 16 x 16 blocks of the diagonal, then the blocks below by
-X2·A21·X1. Rounding point: the result to out_dtype. Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024 (arXiv
2412.06464); FLA's operator of this name.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ._dispatch import Implementation, prepare, run


def solve_tril(
    A: jax.Array,
    *,
    cu_seqlens: jax.Array | None = None,
    out_dtype: Any = jnp.float32,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Returns [B,T,H_v,BT] in out_dtype.

    Args:
        A: [B,T,H_v,BT] fp32, of `chunk_scaled_dot_kkt`; BT 16, 32 or 64. What it holds on a chunk's diagonal and above is not
            looked at.
        out_dtype: float32, bfloat16 or float16.
        cu_seqlens, implementation: as in `chunk_local_cumsum`, as are gradients and errors.
    """
    return run(prepare("solve_tril", A=A, cu_seqlens=cu_seqlens, out_dtype=out_dtype), implementation)
