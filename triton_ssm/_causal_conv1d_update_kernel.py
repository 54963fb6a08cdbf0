# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `causal_conv1d_update`: the few tokens of BLOCK_SIZE_B sequences by BLOCK_SIZE_D channels.

The states are read and written once. With one token each, a program asks for the tokens and states of all its sequences before
it works on the first, so that one wait is for all of them and the taps are loaded and taken apart once. Packed sequences
have a program each.
"""

import triton
import triton.language as tl

from ._causal_conv1d_window import convolve, load_taps
from ._slots import is_slot


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1; nor where
# an index array begins, which may be a slice of the batch's.
@triton.jit(
    do_not_specialize=["n_tokens", "n_sequences", "n_slots", "null_slot"],
    do_not_specialize_on_alignment=["slots_ptr", "cu_seqlens_ptr", "accepted_ptr"],
)
def causal_conv1d_update_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, y_ptr, slots_ptr, cu_seqlens_ptr, accepted_ptr,
    n_tokens, n_sequences, n_slots, null_slot, x_stride, y_stride, slot_stride, row_stride,
    D: tl.constexpr, L: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
    BLOCK_SIZE_D: tl.constexpr, BLOCK_SIZE_B: tl.constexpr,
):  # fmt: skip
    SPECULATIVE: tl.constexpr = accepted_ptr is not None
    BLOCKS: tl.constexpr = (D + BLOCK_SIZE_D - 1) // BLOCK_SIZE_D
    first = (tl.program_id(0) // BLOCKS).to(tl.int64) * BLOCK_SIZE_B
    d = (tl.program_id(0) % BLOCKS) * BLOCK_SIZE_D + tl.arange(0, BLOCK_SIZE_D)
    mask = d < D

    if cu_seqlens_ptr is None:
        slots = ()
        for i in tl.static_range(BLOCK_SIZE_B):
            slots += (_load_slot(slots_ptr, first + i, first + i < n_sequences),)
        tokens = ()
        for i in tl.static_range(BLOCK_SIZE_B):
            n = first + i
            tokens += (tl.load(x_ptr + n * x_stride + d, mask=mask & (n < n_sequences), other=0.0),)
        windows = ()
        for i in tl.static_range(BLOCK_SIZE_B):
            offset = _history(accepted_ptr, first + i, first + i < n_sequences, L, W)
            keep = mask & is_slot(slots[i], null_slot, n_slots)
            rows = state_ptr + slots[i] * slot_stride + d
            windows += (_load_window(rows + (offset + W - 2) * row_stride, row_stride, keep, W),)
        # Only now the taps, for taking them apart waits for them: the states and the tokens are on their way already.
        w0, w1, w2, w3, w4, w5, bias = load_taps(weight_ptr, bias_ptr, d, mask, W)
        # The rows of a slot may be another thread's to write than to read.
        tl.debug_barrier()
        for i in tl.static_range(BLOCK_SIZE_B):
            n = first + i
            slot, x = slots[i], tokens[i]
            p1, p2, p3, p4, p5 = windows[i]
            live = is_slot(slot, null_slot, n_slots)
            y = convolve(x, p1, p2, p3, p4, p5, w0, w1, w2, w3, w4, w5, bias, W, SILU)
            y = tl.where(live, y, _fill(slot, null_slot)).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + n * y_stride + d, y, mask=mask & (n < n_sequences))
            _store_window(state_ptr + slot * slot_stride + d, x, p1, p2, p3, p4, row_stride, mask & live, W)
    else:
        n = first
        # Bounds are data: whatever they hold, no row outside [0, n_tokens) is touched. Without a sequence the one program
        # of a channel block is there for the padding rows alone.
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + n).to(tl.int64), 0), n_tokens)
        end = tl.load(cu_seqlens_ptr + tl.minimum(n + 1, n_sequences)).to(tl.int64)
        end = tl.minimum(tl.maximum(end, begin), n_tokens)
        last = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + n_sequences).to(tl.int64), 0), n_tokens)
        for t in range(last + n, n_tokens, tl.maximum(n_sequences, 1)):
            tl.store(y_ptr + t * y_stride + d, tl.zeros((BLOCK_SIZE_D,), y_ptr.dtype.element_ty), mask=mask)

        some = begin < end
        slot = _load_slot(slots_ptr, n, some)
        live = is_slot(slot, null_slot, n_slots)
        keep = mask & live
        rows = state_ptr + slot * slot_stride + d
        offset = _history(accepted_ptr, n, some, L, W)
        p1, p2, p3, p4, p5 = _load_window(rows + (offset + W - 2) * row_stride, row_stride, keep, W)
        w0, w1, w2, w3, w4, w5, bias = load_taps(weight_ptr, bias_ptr, d, mask, W)
        tl.debug_barrier()
        if SPECULATIVE:
            # What is accepted next time may end at this step's first token: the window without its oldest row stays.
            _store_window(rows, p1, p2, p3, p4, p5, row_stride, keep, W - 1)
        fill = _fill(slot, null_slot)
        for t in range(begin, end):
            x = tl.load(x_ptr + t * x_stride + d, mask=mask, other=0.0)
            y = convolve(x, p1, p2, p3, p4, p5, w0, w1, w2, w3, w4, w5, bias, W, SILU)
            tl.store(y_ptr + t * y_stride + d, tl.where(live, y, fill).to(y_ptr.dtype.element_ty), mask=mask)
            if SPECULATIVE:
                row = W - 2 + t - begin
                tl.store(rows + row * row_stride, x, mask=keep & (row < L))
            p1, p2, p3, p4, p5 = x, p1, p2, p3, p4
        if not SPECULATIVE:
            _store_window(rows, p1, p2, p3, p4, p5, row_stride, keep, W)


@triton.jit
def _load_slot(slots_ptr, n, some):
    """Sequence n's slot; -1, which is padding, unless `some`."""
    if slots_ptr is None:
        slot = tl.where(some, n, -1)
    else:
        slot = tl.load(slots_ptr + n, mask=some, other=-1).to(tl.int64)
    return slot


@triton.jit
def _fill(slot, null_slot):
    """A row of y without a state: zero for padding, NaN for a slot past the pool."""
    return tl.where((slot < 0) | (slot == null_slot), 0.0, float("nan"))


@triton.jit
def _history(accepted_ptr, n, some, L: tl.constexpr, W: tl.constexpr):
    """The slot's row that sequence n's history begins at."""
    if accepted_ptr is None:
        row = n * 0
    else:
        accepted = tl.load(accepted_ptr + n, mask=some, other=0).to(tl.int64)
        row = tl.minimum(tl.maximum(accepted - 1, 0), L - (W - 1))
    return row


@triton.jit
def _load_window(newest, row_stride, keep, W: tl.constexpr):
    p1 = tl.load(newest, mask=keep, other=0.0)
    p2, p3, p4, p5 = p1, p1, p1, p1
    if W > 2:
        p2 = tl.load(newest - row_stride, mask=keep, other=0.0)
    if W > 3:
        p3 = tl.load(newest - 2 * row_stride, mask=keep, other=0.0)
    if W > 4:
        p4 = tl.load(newest - 3 * row_stride, mask=keep, other=0.0)
    if W > 5:
        p5 = tl.load(newest - 4 * row_stride, mask=keep, other=0.0)
    return p1, p2, p3, p4, p5


@triton.jit
def _store_window(rows, p1, p2, p3, p4, p5, row_stride, keep, W: tl.constexpr):
    """The newest W - 1 inputs to the first W - 1 rows, oldest first."""
    if W > 5:
        tl.store(rows + (W - 6) * row_stride, p5, mask=keep)
    if W > 4:
        tl.store(rows + (W - 5) * row_stride, p4, mask=keep)
    if W > 3:
        tl.store(rows + (W - 4) * row_stride, p3, mask=keep)
    if W > 2:
        tl.store(rows + (W - 3) * row_stride, p2, mask=keep)
    if W > 1:
        tl.store(rows + (W - 2) * row_stride, p1, mask=keep)
