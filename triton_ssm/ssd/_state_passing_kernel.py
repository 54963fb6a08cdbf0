# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `state_passing`: BLOCK_SIZE elements of one head's state, carried in fp32 through a sequence's chunks."""

import triton
import triton.language as tl

from .._numerics import exp
from ._chunks import bound


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1; nor where
# an index array begins, which may be a slice of the batch's.
@triton.jit(
    do_not_specialize=["n_tokens", "n_chunks", "n_slots"],
    do_not_specialize_on_alignment=["slots_ptr", "cu_seqlens_ptr"],
)
def state_passing_kernel(
    states_ptr, dA_cumsum_ptr, initial_ptr, before_ptr, after_ptr, final_ptr, slots_ptr, cu_seqlens_ptr,
    n_tokens, n_chunks, n_slots, final_slot_stride,
    H: tl.constexpr, SIZE: tl.constexpr, L: tl.constexpr, CHUNKS_PER_EXPORT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """SIZE: elements of a head's state. `before_ptr` may be `states_ptr`: every element is read before its place is written.

    `after_ptr`: the state after every CHUNKS_PER_EXPORT-th chunk, and the last, at the slots of chunks that long.
    """
    BLOCKS: tl.constexpr = (SIZE + BLOCK_SIZE - 1) // BLOCK_SIZE
    pid = tl.program_id(0)
    # Offsets are 64-bit: the states may have more than 2^31 elements.
    sequence = (pid // (BLOCKS * H)).to(tl.int64)
    h = (pid // BLOCKS) % H
    e = (pid % BLOCKS) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = e < SIZE
    if cu_seqlens_ptr is None:
        chunks = n_chunks + 0
        first = sequence * n_chunks
        first_decay = (sequence * H + h) * n_chunks
        first_export = sequence * ((n_chunks + CHUNKS_PER_EXPORT - 1) // CHUNKS_PER_EXPORT)
    else:
        begin = bound(cu_seqlens_ptr, sequence, n_tokens)
        end = bound(cu_seqlens_ptr, sequence + 1, n_tokens)
        chunks = (tl.maximum(end - begin, 0) + L - 1) // L
        first = begin // L + sequence
        first_decay = h * n_chunks.to(tl.int64) + first
        first_export = begin // (L * CHUNKS_PER_EXPORT) + sequence

    carry = tl.zeros((BLOCK_SIZE,), tl.float32)
    if initial_ptr is not None:
        carry = tl.load(initial_ptr + (sequence * H + h) * SIZE + e, mask=mask, other=0.0).to(tl.float32)
    dA_cumsum_ptr += first_decay * L + L - 1
    for c in tl.range(0, chunks, num_stages=STAGES):
        decay = exp(tl.load(dA_cumsum_ptr + c * L))
        place = ((first + c) * H + h) * SIZE + e
        state = tl.load(states_ptr + place, mask=mask, other=0.0)
        if before_ptr is not None:
            tl.store(before_ptr + place, carry.to(before_ptr.dtype.element_ty), mask=mask)
        carry = carry * decay + state
        if after_ptr is not None:
            if ((c + 1) % CHUNKS_PER_EXPORT == 0) | (c + 1 == chunks):
                export = first_export + c // CHUNKS_PER_EXPORT
                rounded = carry.to(after_ptr.dtype.element_ty)
                tl.store(after_ptr + (export * H + h) * SIZE + e, rounded, mask=mask)

    if final_ptr is not None:
        slot = sequence
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + sequence).to(tl.int64)
        kept = mask & (slot >= 0) & (slot < n_slots)
        final = final_ptr + slot * final_slot_stride + h * SIZE + e
        tl.store(final, carry.to(final_ptr.dtype.element_ty), mask=kept)
