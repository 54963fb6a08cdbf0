# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""Last kernel of the fused scan in plain Triton: y and the states of one piece, for any shape. Its twin in Gluon is faster.

Everything is computed transposed. The state S [P,N] stays in registers from chunk to chunk, in fp32 to be carried on and
rounded as the left operand of S·C^T; M^T [j,i] is a right operand.
"""

import triton
import triton.language as tl

from .._numerics import silu
from ._fused_pieces import CHUNK, bounds_of, first_row, first_slot, sequence_of_slot


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1; nor where
# an index array begins, which may be a slice of the batch's.
@triton.jit(
    do_not_specialize=[
        "n_tokens", "chunks_per_row", "pieces_per_row", "states_per_row", "rows_per_row", "n_sequences",
        "chunks_per_piece", "splits", "n_final", "exports_per_row",
    ],
    do_not_specialize_on_alignment=["final_indices_ptr", "cu_seqlens_ptr"]
)  # fmt: skip
def fused_out_kernel(
    x_ptr, B_ptr, C_ptr, ab_ptr, D_ptr, z_ptr, y_ptr, initial_ptr, states_ptr, totals_ptr,
    final_ptr, final_indices_ptr, export_ptr, cu_seqlens_ptr,
    n_tokens, chunks_per_row, pieces_per_row, states_per_row, rows_per_row, n_sequences, chunks_per_piece, splits,
    n_final, final_stride, exports_per_row, x_stride, B_stride, C_stride, z_stride,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, D_PER_HEADDIM: tl.constexpr,
    ALIGNED: tl.constexpr, SCANNED: tl.constexpr, EXPORT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SIZE_P: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (P + BLOCK_SIZE_P - 1) // BLOCK_SIZE_P
    # Heads are the fastest axis of the grid: those of a group read B and C together, through the L2 cache.
    slot = tl.program_id(0) // (H * BLOCKS)
    h = tl.program_id(0) % (H * BLOCKS) // BLOCKS
    size = chunks_per_piece * CHUNK
    n = sequence_of_slot(cu_seqlens_ptr, slot, pieces_per_row, size, n_sequences, n_tokens, 1)
    begin, end = bounds_of(cu_seqlens_ptr, n, n_sequences, n_tokens)
    k = slot - first_slot(cu_seqlens_ptr, n, begin, pieces_per_row, size, 1)
    # A sequence without tokens has a first piece too, which hands the state on.
    if (n == n_sequences) | (k < 0) | ((k > 0) & (begin + k * size >= end)):
        return
    p = tl.program_id(0) % BLOCKS * BLOCK_SIZE_P + tl.arange(0, BLOCK_SIZE_P)
    d = tl.arange(0, BLOCK_SIZE_N)
    i = tl.arange(0, CHUNK)
    in_headdim, in_dstate = p < P, d < N
    in_state = in_headdim[:, None] & in_dstate[None, :]
    element = h.to(tl.int64) * (P * N) + p[:, None] * N + d[None, :]

    state = tl.zeros((BLOCK_SIZE_P, BLOCK_SIZE_N), tl.float32)
    before = first_slot(cu_seqlens_ptr, n, begin, states_per_row, size // splits, 0)
    if initial_ptr is not None:
        if not SCANNED or k == 0:
            initial = initial_ptr + n.to(tl.int64) * (H * P * N) + element
            state = tl.load(initial, mask=in_state, other=0.0).to(tl.float32)
    if SCANNED:
        if k > 0:
            state = tl.load(states_ptr + (before + k * splits - 1) * (H * P * N) + element, mask=in_state, other=0.0)
    elif states_ptr is not None:
        for q in range(0, k * splits):
            total = tl.load(totals_ptr + (before + q) * H + h)
            own = tl.load(states_ptr + (before + q) * (H * P * N) + element, mask=in_state, other=0.0)
            state = state * tl.exp2(total) + own

    token = begin + k * size
    row = first_row(cu_seqlens_ptr, n, begin, rows_per_row, ALIGNED) + k * size
    chunk = first_slot(cu_seqlens_ptr, n, begin, chunks_per_row, CHUNK, 1) + k * chunks_per_piece
    group = h // (H // G) * N
    x_ptr += i[None, :] * x_stride + (h * P + p)[:, None]
    B_ptr += i[:, None] * B_stride + (group + d)[None, :]
    C_ptr += i[None, :] * C_stride + (group + d)[:, None]
    y_ptr += i[None, :] * (H * P) + (h * P + p)[:, None]
    if z_ptr is not None:
        z_ptr += i[None, :] * z_stride + (h * P + p)[:, None]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if D_ptr is not None:
        if D_PER_HEADDIM:
            D = tl.load(D_ptr + h * P + p, mask=in_headdim, other=0.0).to(tl.float32)[:, None]
        else:
            D = tl.load(D_ptr + h).to(tl.float32)

    chunks = tl.minimum(tl.cdiv(end - token, CHUNK), chunks_per_piece).to(tl.int32)
    for c in tl.range(0, chunks, num_stages=STAGES if dtype != tl.float32 else 1):
        first, at = token + c * CHUNK, row + c * CHUNK
        live = i < end - first
        xt = tl.load(x_ptr + at * x_stride, mask=in_headdim[:, None] & live[None, :], other=0.0)
        B = tl.load(B_ptr + at * B_stride, mask=live[:, None] & in_dstate[None, :], other=0.0)
        Ct = tl.load(C_ptr + at * C_stride, mask=in_dstate[:, None] & live[None, :], other=0.0)
        ab = ab_ptr + ((chunk + c) * H + h) * (2 * CHUNK)
        a = tl.load(ab + i)
        b = tl.load(ab + CHUNK + i)
        total = tl.load(ab + CHUNK - 1)
        CBt = tl.dot(B, Ct, input_precision=PRECISION)
        y = tl.dot(state.to(dtype), Ct, input_precision=PRECISION) * tl.exp2(a)[None, :]
        Mt = tl.where(i[:, None] <= i[None, :], CBt * tl.exp2(a[None, :] - b[:, None]), 0.0)
        y = tl.dot(xt, Mt.to(dtype), y, input_precision=PRECISION)
        x = xt.to(tl.float32)
        if D_ptr is not None:
            y += x * D
        if z_ptr is not None:
            mask = in_headdim[:, None] & live[None, :]
            y *= silu(tl.load(z_ptr + first * z_stride, mask=mask, other=0.0).to(tl.float32))
        weighted = (x * tl.exp2(total - b)[None, :]).to(dtype)
        state = tl.dot(weighted, B, state * tl.exp2(total), input_precision=PRECISION)
        tl.store(y_ptr + first * (H * P), y.to(dtype), mask=in_headdim[:, None] & live[None, :])
        if EXPORT > 0:
            done = k * size + (c + 1) * CHUNK
            if (done % EXPORT == 0) | (done >= end - begin):
                place = first_slot(cu_seqlens_ptr, n, begin, exports_per_row, EXPORT, 1) + (done - 1) // EXPORT
                export = export_ptr + place * (H * P * N) + element
                tl.store(export, state.to(export_ptr.dtype.element_ty), mask=in_state)

    if final_ptr is not None:
        if token + size >= end:
            target = n.to(tl.int64)
            if final_indices_ptr is not None:
                target = tl.load(final_indices_ptr + n).to(tl.int64)
            if (target >= 0) & (target < n_final):
                tl.store(
                    final_ptr + target * final_stride + element, state.to(final_ptr.dtype.element_ty), mask=in_state
                )
