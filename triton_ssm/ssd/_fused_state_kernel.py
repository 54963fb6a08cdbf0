# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The state that each piece of a sequence would leave if it started from zero, and the scan that strings them together.

    E = Σ_j 2^(total decay after j)·dt[j]·x[j] ⊗ B[j]          S[q] = 2^total[q]·S[q-1] + E[q]

Chunks are walked from the last to the first with the decay after them folded into the tokens' weights: the sum is never
rescaled. Only pieces that have a piece of the output kernel after them are needed, and those are whole: no masks.
"""

import triton
import triton.language as tl

from ._fused_pieces import CHUNK, bounds_of, first_row, first_slot, sequence_of_slot


@triton.jit
def needed_pieces(begin, end, piece_tokens, splits):
    """State pieces of a sequence that something comes after: `splits` for each output piece but the last."""
    return tl.maximum(tl.cdiv(end - begin, piece_tokens) - 1, 0) * splits


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@triton.jit(
    do_not_specialize=[
        "n_tokens", "chunks_per_row", "states_per_row", "rows_per_row", "n_sequences", "chunks_per_state", "splits",
    ]
)  # fmt: skip
def fused_state_kernel(
    x_ptr, B_ptr, ab_ptr, states_ptr, totals_ptr, cu_seqlens_ptr,
    n_tokens, chunks_per_row, states_per_row, rows_per_row, n_sequences, chunks_per_state, splits, x_stride, B_stride,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SIZE_P: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (P + BLOCK_SIZE_P - 1) // BLOCK_SIZE_P
    slot = tl.program_id(0) // (H * BLOCKS)
    h = tl.program_id(0) % (H * BLOCKS) // BLOCKS
    size = chunks_per_state * CHUNK
    n = sequence_of_slot(cu_seqlens_ptr, slot, states_per_row, size, n_sequences, n_tokens, 0)
    begin, end = bounds_of(cu_seqlens_ptr, n, n_sequences, n_tokens)
    q = slot - first_slot(cu_seqlens_ptr, n, begin, states_per_row, size, 0)
    if (n == n_sequences) | (q < 0) | (q >= needed_pieces(begin, end, size * splits, splits)):
        return
    p = tl.program_id(0) % BLOCKS * BLOCK_SIZE_P + tl.arange(0, BLOCK_SIZE_P)
    k = tl.arange(0, BLOCK_SIZE_N)
    j = tl.arange(0, CHUNK)
    in_headdim, in_dstate = p < P, k < N
    row = first_row(cu_seqlens_ptr, n, begin, rows_per_row, ALIGNED) + q * size
    chunk = first_slot(cu_seqlens_ptr, n, begin, chunks_per_row, CHUNK, 1) + q * chunks_per_state
    x_ptr += j[:, None] * x_stride + (h * P + p)[None, :]
    B_ptr += j[None, :] * B_stride + (h // (H // G) * N + k)[:, None]
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    state = tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_P), tl.float32)
    after = 0.0
    for back in tl.range(0, chunks_per_state, num_stages=STAGES if dtype != tl.float32 else 1):
        c = chunks_per_state - 1 - back
        first = row + c * CHUNK
        x = tl.load(x_ptr + first * x_stride, mask=in_headdim[None, :], other=0.0)
        Bt = tl.load(B_ptr + first * B_stride, mask=in_dstate[:, None], other=0.0)
        ab = ab_ptr + ((chunk + c) * H + h) * (2 * CHUNK)
        total = tl.load(ab + CHUNK - 1)
        weight = tl.exp2(total + after - tl.load(ab + CHUNK + j))
        state = tl.dot(Bt, (x.to(tl.float32) * weight[:, None]).to(dtype), state, input_precision=PRECISION)
        after += total
    out = states_ptr + ((slot.to(tl.int64) * H + h) * P + p[None, :]) * N + k[:, None]
    tl.store(out, state, mask=in_dstate[:, None] & in_headdim[None, :])
    tl.store(totals_ptr + slot.to(tl.int64) * H + h, after)


@triton.jit(
    do_not_specialize=["n_tokens", "states_per_row", "n_sequences", "chunks_per_state", "splits"],
)
def fused_scan_kernel(
    states_ptr, totals_ptr, initial_ptr, cu_seqlens_ptr,
    n_tokens, states_per_row, n_sequences, chunks_per_state, splits,
    H: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Replaces each piece's own end state by the sequence's state there. BLOCK_SIZE of SIZE elements of one head.

    The program of a sequence's first piece does it for all; the others have nothing to do.
    """
    BLOCKS: tl.constexpr = (SIZE + BLOCK_SIZE - 1) // BLOCK_SIZE
    AHEAD: tl.constexpr = 4
    slot = tl.program_id(0) // (H * BLOCKS)
    h = tl.program_id(0) % (H * BLOCKS) // BLOCKS
    size = chunks_per_state * CHUNK
    n = sequence_of_slot(cu_seqlens_ptr, slot, states_per_row, size, n_sequences, n_tokens, 0)
    begin, end = bounds_of(cu_seqlens_ptr, n, n_sequences, n_tokens)
    if (n == n_sequences) | (slot != first_slot(cu_seqlens_ptr, n, begin, states_per_row, size, 0)):
        return
    needed = needed_pieces(begin, end, size * splits, splits)
    element = tl.program_id(0) % BLOCKS * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = element < SIZE
    head = slot.to(tl.int64) * H + h
    state = tl.zeros((BLOCK_SIZE,), tl.float32)
    if initial_ptr is not None:
        initial_ptr += (n.to(tl.int64) * H + h) * SIZE
        state = tl.load(initial_ptr + element, mask=inside, other=0.0).to(tl.float32)
    for first in range(0, needed, AHEAD):
        # All loads of a step stand before its stores, or each would wait for the one before.
        q0, q1, q2, q3 = head + first * H, head + (first + 1) * H, head + (first + 2) * H, head + (first + 3) * H
        in1, in2, in3 = inside & (first + 1 < needed), inside & (first + 2 < needed), inside & (first + 3 < needed)
        end0 = tl.load(states_ptr + q0 * SIZE + element, mask=inside, other=0.0)
        end1 = tl.load(states_ptr + q1 * SIZE + element, mask=in1, other=0.0)
        end2 = tl.load(states_ptr + q2 * SIZE + element, mask=in2, other=0.0)
        end3 = tl.load(states_ptr + q3 * SIZE + element, mask=in3, other=0.0)
        total0 = tl.load(totals_ptr + q0)
        total1 = tl.load(totals_ptr + q1, mask=first + 1 < needed, other=0.0)
        total2 = tl.load(totals_ptr + q2, mask=first + 2 < needed, other=0.0)
        total3 = tl.load(totals_ptr + q3, mask=first + 3 < needed, other=0.0)
        state = state * tl.exp2(total0) + end0
        tl.store(states_ptr + q0 * SIZE + element, state, mask=inside)
        state = state * tl.exp2(total1) + end1
        tl.store(states_ptr + q1 * SIZE + element, state, mask=in1)
        state = state * tl.exp2(total2) + end2
        tl.store(states_ptr + q2 * SIZE + element, state, mask=in2)
        state = state * tl.exp2(total3) + end3
        tl.store(states_ptr + q3 * SIZE + element, state, mask=in3)
