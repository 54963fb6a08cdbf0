# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `causal_conv1d` and `causal_conv1d_split`: BLOCK_SIZE_T tokens of one sequence by BLOCK_SIZE_D channels.

Each input is read once: a program walks down its tokens with the last W - 1 of them in registers and asks for the next four
rows before it works on the current four, so that their loads are on the way while the window slides.

Which tokens a program has needs no table and no sum over lengths. Sequence n gets the blocks from
cu_seqlens[n] // BLOCK_SIZE_T + n on, of which there are always enough; a binary search finds n. The tokens past the last
sequence count as one more sequence, of padding.
"""

import triton
import triton.language as tl

from ._causal_conv1d_window import convolve, load_taps


@triton.jit
def _bound(cu_seqlens_ptr, n, n_tokens):
    # Bounds are data: whatever they hold, no row outside [0, n_tokens) is touched.
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + n).to(tl.int64), 0), n_tokens)


@triton.jit
def _find_sequence(cu_seqlens_ptr, n_sequences, n_tokens, block, UNIT: tl.constexpr):
    """The last n in [0, n_sequences] whose first block, cu_seqlens[n] // UNIT + n, is not after `block`."""
    low = n_sequences * 0
    high = n_sequences + 1
    while high - low > 1:
        middle = (low + high) // 2
        if _bound(cu_seqlens_ptr, middle, n_tokens) // UNIT + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _input(
    x_ptr, x_stride, history_ptr, history_stride, has_history, r, length, d, mask,
    W: tl.constexpr, HAS_HISTORY: tl.constexpr,
):  # fmt: skip
    """The input at position r of a sequence: zero past its end; before its start what its state holds, or zero."""
    x = tl.load(x_ptr + r * x_stride + d, mask=mask & (r >= 0) & (r < length), other=0.0)
    if HAS_HISTORY:
        old = tl.load(history_ptr + (W - 1 + r) * history_stride + d, mask=mask & (r < 0) & has_history, other=0.0)
        x = tl.where(r >= 0, x, old)
    return x


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1; nor where
# an index array begins, which may be a slice of the batch's.
@triton.jit(
    do_not_specialize=["n_tokens", "n_sequences", "n_slots", "null_slot", "out_rows", "x_batch_stride"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "slots_ptr", "has_history_ptr"],
)
def causal_conv1d_kernel(
    x_ptr, weight_ptr, bias_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr,
    cu_seqlens_ptr, history_ptr, final_ptr, slots_ptr, has_history_ptr,
    n_tokens, n_sequences, n_slots, null_slot, out_rows,
    x_batch_stride, x_stride, history_slot_stride, history_stride, final_slot_stride, final_stride,
    SIZE_0: tl.constexpr, SIZE_1: tl.constexpr, SIZE_2: tl.constexpr, SIZE_3: tl.constexpr,
    W: tl.constexpr, SILU: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_SIZE_T: tl.constexpr, BLOCK_SIZE_D: tl.constexpr,
):  # fmt: skip
    PACKED: tl.constexpr = cu_seqlens_ptr is not None
    POOL: tl.constexpr = slots_ptr is not None
    HAS_HISTORY: tl.constexpr = history_ptr is not None
    # Channel blocks run fastest, so that neighbours stream along the rows; none of them straddles two outputs.
    END_0: tl.constexpr = (SIZE_0 + BLOCK_SIZE_D - 1) // BLOCK_SIZE_D
    END_1: tl.constexpr = END_0 + (SIZE_1 + BLOCK_SIZE_D - 1) // BLOCK_SIZE_D
    END_2: tl.constexpr = END_1 + (SIZE_2 + BLOCK_SIZE_D - 1) // BLOCK_SIZE_D
    END_3: tl.constexpr = END_2 + (SIZE_3 + BLOCK_SIZE_D - 1) // BLOCK_SIZE_D
    block = (tl.program_id(0) // END_3).to(tl.int64)
    channel_block = tl.program_id(0) % END_3
    y_ptr = y0_ptr
    size = channel_block * 0 + SIZE_0
    before = channel_block * 0
    first_block = channel_block * 0
    if SIZE_1 > 0:
        if channel_block >= END_0:
            y_ptr, size, before, first_block = y1_ptr, size * 0 + SIZE_1, before * 0 + SIZE_0, first_block + END_0
    if SIZE_2 > 0:
        if channel_block >= END_1:
            y_ptr, size, before = y2_ptr, size * 0 + SIZE_2, before * 0 + SIZE_0 + SIZE_1
            first_block = first_block * 0 + END_1
    if SIZE_3 > 0:
        if channel_block >= END_2:
            y_ptr, size, before = y3_ptr, size * 0 + SIZE_3, before * 0 + SIZE_0 + SIZE_1 + SIZE_2
            first_block = first_block * 0 + END_2
    c = (channel_block - first_block) * BLOCK_SIZE_D + tl.arange(0, BLOCK_SIZE_D)
    mask = c < size
    d = before + c

    # Rows r0 to r0 + BLOCK_SIZE_T of sequence n, of `length` tokens from `begin` on, go to `out_row` on.
    if not PACKED:
        # A row without tokens still hands its state on.
        blocks_per_row = tl.maximum((out_rows + BLOCK_SIZE_T - 1) // BLOCK_SIZE_T, 1)
        n = block // blocks_per_row
        r0 = (block % blocks_per_row) * BLOCK_SIZE_T
        x_ptr += n * x_batch_stride
        length = n_tokens + r0 * 0
        out_row = n * out_rows + r0
        live = n >= 0
        rows = tl.minimum(r0 + BLOCK_SIZE_T, out_rows)
    else:
        if CHUNK == 0:
            n = _find_sequence(cu_seqlens_ptr, n_sequences, n_tokens, block, BLOCK_SIZE_T)
        else:
            n = _find_sequence(cu_seqlens_ptr, n_sequences, n_tokens, block * BLOCK_SIZE_T // CHUNK, CHUNK)
        begin = _bound(cu_seqlens_ptr, n, n_tokens)
        live = n < n_sequences
        # The tokens past the last sequence are padding: their rows are written, and hold nothing.
        end = tl.maximum(_bound(cu_seqlens_ptr, tl.minimum(n + 1, n_sequences), n_tokens), begin)
        if CHUNK == 0:
            end = tl.where(live, end, n_tokens)
            r0 = (block - begin // BLOCK_SIZE_T - n) * BLOCK_SIZE_T
            out_row = begin + r0
        else:
            r0 = block * BLOCK_SIZE_T - (begin // CHUNK + n) * CHUNK
            out_row = block * BLOCK_SIZE_T
        length = end - begin
        x_ptr += begin * x_stride
        rows = r0 + BLOCK_SIZE_T
    if CHUNK == 0:
        rows = tl.minimum(rows, length)

    fill = 0.0
    slot = n
    has_history = live
    if POOL:
        slot = tl.load(slots_ptr + n, mask=live, other=-1).to(tl.int64)
        live = (slot >= 0) & (slot != null_slot)
        fill = tl.where(live & (slot >= n_slots), float("nan"), 0.0)
        live = live & (slot < n_slots)
        has_history = tl.load(has_history_ptr + n, mask=live, other=0) != 0
    if HAS_HISTORY:
        history_ptr += slot * history_slot_stride

    if live:
        p1 = _input(x_ptr, x_stride, history_ptr, history_stride, has_history, r0 - 1, length, d, mask, W, HAS_HISTORY)
        p2, p3, p4, p5 = p1, p1, p1, p1
        if W > 2:
            p2 = _input(
                x_ptr, x_stride, history_ptr, history_stride, has_history, r0 - 2, length, d, mask, W, HAS_HISTORY
            )
        if W > 3:
            p3 = _input(
                x_ptr, x_stride, history_ptr, history_stride, has_history, r0 - 3, length, d, mask, W, HAS_HISTORY
            )
        if W > 4:
            p4 = _input(
                x_ptr, x_stride, history_ptr, history_stride, has_history, r0 - 4, length, d, mask, W, HAS_HISTORY
            )
        if W > 5:
            p5 = _input(
                x_ptr, x_stride, history_ptr, history_stride, has_history, r0 - 5, length, d, mask, W, HAS_HISTORY
            )

        x_row = x_ptr + d
        n0 = tl.load(x_row + r0 * x_stride, mask=mask & (r0 < length), other=0.0)
        n1 = tl.load(x_row + (r0 + 1) * x_stride, mask=mask & (r0 + 1 < length), other=0.0)
        n2 = tl.load(x_row + (r0 + 2) * x_stride, mask=mask & (r0 + 2 < length), other=0.0)
        n3 = tl.load(x_row + (r0 + 3) * x_stride, mask=mask & (r0 + 3 < length), other=0.0)
        # Only now the taps, for splitting them waits for them: the first rows are on their way already.
        w0, w1, w2, w3, w4, w5, bias = load_taps(weight_ptr, bias_ptr, d, mask, W)
        for r in range(r0, rows, 4):
            x0, x1, x2, x3 = n0, n1, n2, n3
            # the next rows, or what is left of this program's
            stop = tl.minimum(length, r0 + BLOCK_SIZE_T)
            n0 = tl.load(x_row + (r + 4) * x_stride, mask=mask & (r + 4 < stop), other=0.0)
            n1 = tl.load(x_row + (r + 5) * x_stride, mask=mask & (r + 5 < stop), other=0.0)
            n2 = tl.load(x_row + (r + 6) * x_stride, mask=mask & (r + 6 < stop), other=0.0)
            n3 = tl.load(x_row + (r + 7) * x_stride, mask=mask & (r + 7 < stop), other=0.0)
            y_row = y_ptr + (out_row + r - r0) * size + c
            y0 = convolve(x0, p1, p2, p3, p4, p5, w0, w1, w2, w3, w4, w5, bias, W, SILU)
            y1 = convolve(x1, x0, p1, p2, p3, p4, w0, w1, w2, w3, w4, w5, bias, W, SILU)
            y2 = convolve(x2, x1, x0, p1, p2, p3, w0, w1, w2, w3, w4, w5, bias, W, SILU)
            y3 = convolve(x3, x2, x1, x0, p1, p2, w0, w1, w2, w3, w4, w5, bias, W, SILU)
            p1, p2, p3, p4, p5 = x3, x2, x1, x0, p1
            _store(y_row, y0, mask, r, rows, length, CHUNK)
            _store(y_row + size, y1, mask, r + 1, rows, length, CHUNK)
            _store(y_row + 2 * size, y2, mask, r + 2, rows, length, CHUNK)
            _store(y_row + 3 * size, y3, mask, r + 3, rows, length, CHUNK)

        # The program that read the old state writes the new one, into the same place if it is a pool's.
        if r0 == 0:
            keep = mask
            if POOL:
                keep = mask & (length > 0)
            r = length - (W - 1)
            f0 = _input(x_ptr, x_stride, history_ptr, history_stride, has_history, r, length, d, mask, W, HAS_HISTORY)
            f1, f2, f3, f4 = f0, f0, f0, f0
            if W > 2:
                f1 = _input(
                    x_ptr, x_stride, history_ptr, history_stride, has_history, r + 1, length, d, mask, W, HAS_HISTORY
                )
            if W > 3:
                f2 = _input(
                    x_ptr, x_stride, history_ptr, history_stride, has_history, r + 2, length, d, mask, W, HAS_HISTORY
                )
            if W > 4:
                f3 = _input(
                    x_ptr, x_stride, history_ptr, history_stride, has_history, r + 3, length, d, mask, W, HAS_HISTORY
                )
            if W > 5:
                f4 = _input(
                    x_ptr, x_stride, history_ptr, history_stride, has_history, r + 4, length, d, mask, W, HAS_HISTORY
                )
            # A pool's rows may be another thread's to write than to read.
            tl.debug_barrier()
            final = final_ptr + slot * final_slot_stride + d
            tl.store(final, f0, mask=keep)
            if W > 2:
                tl.store(final + final_stride, f1, mask=keep)
            if W > 3:
                tl.store(final + 2 * final_stride, f2, mask=keep)
            if W > 4:
                tl.store(final + 3 * final_stride, f3, mask=keep)
            if W > 5:
                tl.store(final + 4 * final_stride, f4, mask=keep)
    else:
        nothing = tl.zeros((BLOCK_SIZE_D,), tl.float32) + fill
        for r in range(r0, rows):
            _store(y_ptr + (out_row + r - r0) * size + c, nothing, mask, r, rows, length, CHUNK)


@triton.jit
def _store(y_row, y, mask, r, rows, length, CHUNK: tl.constexpr):
    """A row of this program's; in the chunk-aligned layout the rows past a sequence's end are its own, too, and zero."""
    if CHUNK > 0:
        y = tl.where(r < length, y, 0.0)
    tl.store(y_row, y.to(y_row.dtype.element_ty), mask=mask & (r < rows))
