# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
# A jitted function is Gluon's language in Python's syntax; the types are Gluon's too.
"""`fused_out_kernel` for Hopper, in Gluon: y and the states of one piece of HEADS neighbouring heads of a group.

Roles, everything transposed as in the plain kernel:

    load      one warp brings chunks by TMA into a ring of STAGES
    scores    one warpgroup: CB^T = B·C^T once for all heads, then each head's M^T = CB^T ∘ decay·dt into a ring of two
    scan      a warpgroup a head: y^T = S·C^T, scaled, plus x^T·M^T; S = S·decay + (x·dt·decay)^T·B

The state S [P,N] stays in the registers of its warpgroup in fp32 and is rounded as a register operand: it never passes
through shared memory, whose bandwidth bounds this kernel. x^T is loaded once, as the register operand of both products.

Hazards. A product with a register operand must be waited for, with that operand among `deps`, before the registers serve
again: none is left open over a loop's back-edge. Shared memory that threads wrote is fenced before tensor cores or TMA read
it. One thread arrives for a warpgroup, so that a barrier of all its warps must stand between their last read and that.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .._numerics import LOG2E
from ._fused_gluon_pieces import CHUNK, bound, row_of, sequence_of_slot

_SCORES = gl.constexpr(2)


@gluon.jit
def _load(
    x_desc, B_desc, C_desc, ab_desc, xs, Bs, Cs, abs_, full, empty, row, chunk, chunks, h, group,
    H: gl.constexpr, P: gl.constexpr, N: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    size: gl.constexpr = (HEADS * P + 2 * N) * CHUNK * 2 + HEADS * 2 * CHUNK * 4
    for c in range(chunks):
        stage = c % STAGES
        mbarrier.wait(empty.index(stage), (c // STAGES & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, size)
        at = row + c * CHUNK
        tma.async_copy_global_to_shared(C_desc, [at, group], bar, Cs.index(stage))
        tma.async_copy_global_to_shared(B_desc, [at, group], bar, Bs.index(stage))
        tma.async_copy_global_to_shared(ab_desc, [(chunk + c) * H + h, 0], bar, abs_.index(stage))
        for i in gl.static_range(HEADS):
            tma.async_copy_global_to_shared(x_desc, [at, (h + i) * P], bar, xs.index(stage * HEADS + i))


@gluon.jit
def _weigh(
    abs_, ws, full, weighed, chunks, HEADS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """2^a and 2^(a[last] - b) once for all threads of a head's warpgroup, each of which would have to compute 32 of them."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    for c in range(chunks):
        stage = c % STAGES
        mbarrier.wait(full.index(stage), c // STAGES & 1)
        ab = row_of(abs_, stage, HEADS)
        w = row_of(ws, stage, HEADS)
        for i in gl.static_range(HEADS):
            a = ab.slice(i * 2 * CHUNK, CHUNK).load(layout)
            total = gl.sum(ab.slice(i * 2 * CHUNK + CHUNK - 1, 1).load(layout), axis=0)
            b = ab.slice((i * 2 + 1) * CHUNK, CHUNK).load(layout)
            w.slice(i * 2 * CHUNK, CHUNK).store(gl.exp2(a))
            w.slice((i * 2 + 1) * CHUNK, CHUNK).store(gl.exp2(total - b))
        gl.thread_barrier()
        mbarrier.arrive(weighed.index(stage))


@gluon.jit
def _masked(value, mask, dtype: gl.constexpr):
    """`value` rounded to `dtype`, and zero where the bits of `mask` are: one instruction for two elements.

    It is a select. A product with 0 would make a NaN of the infinite decay to an earlier token.
    """
    if dtype == gl.bfloat16:
        rounded = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1; and.b32 $0, $0, $3;", "=&r,r,r,r", [value, mask], dtype=gl.bfloat16,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        rounded = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1; and.b32 $0, $0, $3;", "=&r,r,r,r", [value, mask], dtype=gl.float16,
            is_pure=True, pack=2,
        )  # fmt: skip
    return rounded


@gluon.jit
def _score(
    Bs, Cs, abs_, ms, full, scored, taken, chunks, HEADS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    mY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    rows = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, mY))[:, None]
    columns = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, mY))[None, :]
    causal = gl.where(rows <= columns, -1, 0).to(gl.int16)
    nothing = gl.zeros((CHUNK, CHUNK), gl.float32, mY)
    for c in range(chunks):
        stage = c % STAGES
        slot = c % _SCORES
        mbarrier.wait(full.index(stage), c // STAGES & 1)
        CBt = warpgroup_mma(Bs.index(stage), Cs.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        CBt = warpgroup_mma_wait(0, deps=[CBt])
        mbarrier.wait(taken.index(slot), (c // _SCORES & 1) ^ 1)
        ab = row_of(abs_, stage, HEADS)
        for i in gl.static_range(HEADS):
            a = ab.slice(i * 2 * CHUNK, CHUNK).load(gl.SliceLayout(0, mY))
            b = ab.slice((i * 2 + 1) * CHUNK, CHUNK).load(gl.SliceLayout(1, mY))
            Mt = CBt * gl.exp2(a[None, :] - b[:, None])
            ms.index(slot * HEADS + i).store(_masked(Mt, causal, ms.dtype))
        fence_async_shared()
        gl.thread_barrier()
        # The scan waits for this before it gives the stage back, so that nobody needs to hear that it was read here.
        mbarrier.arrive(scored.index(slot))


@gluon.jit
def _clear_rows(tile, live, WIDTH: gl.constexpr):
    """Zeros in the rows from `live` on, whatever they held: a product with 0 would keep a NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    for first in gl.static_range(0, CHUNK, 16):
        part = tile.slice(first, 16)
        rows = first + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
        value = part.load(layout)
        part.store(gl.where((rows < live)[:, None], value, gl.zeros_like(value)))


@gluon.jit
def _elements(P: gl.constexpr, N: gl.constexpr, layout: gl.constexpr):
    """Where a state's elements stand, worked out anew at every use: addresses kept for the end would crowd the loop."""
    p = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;",
        "=r,r",
        [gl.arange(0, P, layout=gl.SliceLayout(1, layout))],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    return p[:, None] * N + gl.arange(0, N, layout=gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _scan(
    y_desc, z_desc, xs, Bs, Cs, ws, ms, ys, full, empty, weighed, scored, taken, z_bars, D_ptr, y_ptr, initial_ptr, states_ptr,
    totals_ptr, final_ptr, export_ptr, token, left, chunks, h0, target, final_stride, pieces, done, length,
    H: gl.constexpr, P: gl.constexpr, N: gl.constexpr, D_PER_HEADDIM: gl.constexpr, SCANNED: gl.constexpr,
    EXPORT: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, i: gl.constexpr,
):  # fmt: skip
    """The warpgroup of head h0 + i.

    Pointers to initial, pieces' and exported states are the sequence's. `done` of its `length` tokens stand before `token`, the
    piece's first one, `left` from there on; `pieces`: states before it. `target`: the final state's slot, negative: none.
    """
    mY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    mS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    aY: gl.constexpr = gl.DotOperandLayout(0, mY, 2)
    aS: gl.constexpr = gl.DotOperandLayout(0, mS, 2)
    dtype: gl.constexpr = xs.dtype
    h = h0 + i
    y_tile = ys.index(i)
    head = h.to(gl.int64) * (P * N)
    state = gl.zeros((P, N), gl.float32, mS)
    if initial_ptr is not None:
        if not SCANNED or pieces == 0:
            state = gl.load(initial_ptr + head + _elements(P, N, mS)).to(gl.float32)
    if SCANNED:
        if pieces > 0:
            state = gl.load(states_ptr + (head + (pieces - 1).to(gl.int64) * (H * P * N)) + _elements(P, N, mS))
    elif states_ptr is not None:
        for q in range(pieces):
            own = gl.load(states_ptr + (head + q.to(gl.int64) * (H * P * N)) + _elements(P, N, mS))
            state = state * gl.exp2(gl.load(totals_ptr + q * H + h)) + own
    nothing = gl.zeros((P, CHUNK), gl.float32, mY)
    if D_ptr is not None:
        rows = gl.arange(0, P, layout=gl.SliceLayout(1, mY))
        D = gl.load(D_ptr + (h * P + rows if D_PER_HEADDIM else h + rows * 0)).to(gl.float32)

    for c in range(chunks):
        stage = c % STAGES
        slot = c % _SCORES
        live = left - c * CHUNK
        B = Bs.index(stage)
        xt_tile = xs.index(stage * HEADS + i).permute((1, 0))
        weights = row_of(ws, stage, HEADS)
        mbarrier.wait(full.index(stage), c // STAGES & 1)
        if live < CHUNK:
            # All warpgroups clear all of B: they write the same zeros.
            _clear_rows(xs.index(stage * HEADS + i), live, P)
            _clear_rows(B, live, N)
            fence_async_shared()
            gl.thread_barrier()
        # Nothing is in flight; but where ptxas cannot see that, it waits once more at a worse place.
        state = warpgroup_mma_wait(0, deps=[state])
        rounded = gl.convert_layout(state.to(dtype), aY)
        y = warpgroup_mma(rounded, Cs.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        # The last chunk's y has left its tile; all warps wait for that here, and with it are done with the last stage.
        tma.store_wait(0)
        if c > 0:
            mbarrier.arrive(empty.index((c + STAGES - 1) % STAGES))
            mbarrier.arrive(taken.index((c + 1) % _SCORES))
        if z_desc is not None:
            mbarrier.expect(z_bars.index(i), CHUNK * P * 2)
            tma.async_copy_global_to_shared(z_desc, [token + c * CHUNK, h * P], z_bars.index(i), y_tile)
        xt = xt_tile.load(aS)
        mbarrier.wait(weighed.index(stage), c // STAGES & 1)
        decay = weights.slice(i * 2 * CHUNK, CHUNK)
        state = state * gl.sum(decay.slice(CHUNK - 1, 1).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)
        weight = weights.slice((i * 2 + 1) * CHUNK, CHUNK).load(gl.SliceLayout(0, aS))
        weighted = (xt.to(gl.float32) * weight[None, :]).to(dtype)
        decay = decay.load(gl.SliceLayout(0, mY))
        xt = gl.convert_layout(xt, aY)
        y, rounded = warpgroup_mma_wait(0, deps=[y, rounded])
        y = y * decay[None, :]
        if D_ptr is not None:
            y += gl.convert_layout(xt, mY).to(gl.float32) * D[:, None]
        mbarrier.wait(scored.index(slot), c // _SCORES & 1)
        y = warpgroup_mma(xt, ms.index(slot * HEADS + i), y, is_async=True)
        state = warpgroup_mma(weighted, B, state, is_async=True)
        y, xt = warpgroup_mma_wait(1, deps=[y, xt])
        if z_desc is not None:
            mbarrier.wait(z_bars.index(i), c & 1)
            z = y_tile.permute((1, 0)).load(mY).to(gl.float32)
            y *= z / (1.0 + gl.exp2(z * -LOG2E))
        y_tile.permute((1, 0)).store(y.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        if live < CHUNK:
            layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // P, P // 8], [4, 1], [1, 0])
            t = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
            p = gl.arange(0, P, layout=gl.SliceLayout(0, layout))
            place = y_ptr + (token + c * CHUNK).to(gl.int64) * (H * P) + (t[:, None] * (H * P) + (h * P + p)[None, :])
            gl.store(place, y_tile.load(layout), mask=(t < live)[:, None])
        else:
            tma.async_copy_shared_to_global(y_desc, [token + c * CHUNK, h * P], y_tile)
        state, weighted = warpgroup_mma_wait(0, deps=[state, weighted])
        if EXPORT > 0:
            now = done + (c + 1) * CHUNK
            if (now % EXPORT == 0) | (now >= length):
                place = export_ptr + (head + ((now - 1) // EXPORT).to(gl.int64) * (H * P * N)) + _elements(P, N, mS)
                gl.store(place, state.to(export_ptr.dtype.element_ty))

    if final_ptr is not None:
        if target >= 0:
            place = final_ptr + (target.to(gl.int64) * final_stride + head) + _elements(P, N, mS)
            gl.store(place, state.to(final_ptr.dtype.element_ty))
    tma.store_wait(0)


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1; nor where
# an index array begins, which may be a slice of the batch's.
@gluon.jit(
    do_not_specialize=[
        "n_tokens", "chunks_per_row", "pieces_per_row", "states_per_row", "rows_per_row", "n_sequences",
        "chunks_per_piece", "splits", "n_final", "exports_per_row",
    ],
    do_not_specialize_on_alignment=["final_indices_ptr", "cu_seqlens_ptr"]
)  # fmt: skip
def fused_out_kernel_hopper(
    y_ptr, ab_desc, x_desc, B_desc, C_desc, z_desc, y_desc, D_ptr, initial_ptr, states_ptr, totals_ptr, final_ptr,
    final_indices_ptr, export_ptr, cu_seqlens_ptr,
    n_tokens, chunks_per_row, pieces_per_row, states_per_row, rows_per_row, n_sequences, chunks_per_piece, splits,
    n_final, final_stride, exports_per_row,
    H: gl.constexpr, G: gl.constexpr, P: gl.constexpr, N: gl.constexpr, D_PER_HEADDIM: gl.constexpr,
    ALIGNED: gl.constexpr, SCANNED: gl.constexpr, EXPORT: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # Heads are the fastest axis of the grid: those of a group read B and C together, through the L2 cache.
    h = gl.program_id(0) % (H // HEADS) * HEADS
    slot = gl.program_id(0) // (H // HEADS)
    size = chunks_per_piece * CHUNK
    if cu_seqlens_ptr is None:
        n = (slot // pieces_per_row).to(gl.int64)
        k = (slot % pieces_per_row).to(gl.int64)
        begin = n * n_tokens
        end = begin + n_tokens
        chunk = n * chunks_per_row
        before = n * states_per_row
        row = n * rows_per_row
        export_slot = n * exports_per_row
    else:
        n = sequence_of_slot(cu_seqlens_ptr, slot, size, n_sequences, n_tokens, 1).to(gl.int64)
        begin = bound(cu_seqlens_ptr, n, n_tokens)
        end = gl.maximum(bound(cu_seqlens_ptr, gl.minimum(n + 1, n_sequences), n_tokens), begin)
        k = slot - begin // size - n
        chunk = begin // CHUNK + n
        before = begin // (size // splits)
        row = begin
        export_slot = begin
        if ALIGNED > 0:
            row = (begin // ALIGNED + n) * ALIGNED
        if EXPORT > 0:
            export_slot = begin // EXPORT + n
    if ALIGNED == 0:
        row = begin
    token = begin + k * size
    # A sequence without tokens has a first piece too, which hands the state on.
    if (n < n_sequences) & (k >= 0) & ((k == 0) | (token < end)):
        target = n.to(gl.int32)
        if final_ptr is not None:
            if final_indices_ptr is not None:
                index = gl.load(final_indices_ptr + n)
                target = gl.where((index >= 0) & (index < n_final), index, -1).to(gl.int32)
            target = gl.where(token + size >= end, target, -1)
        chunks = gl.minimum((end - token + CHUNK - 1) // CHUNK, chunks_per_piece).to(gl.int32)
        if initial_ptr is not None:
            initial_ptr += n * (H * P * N)
        if states_ptr is not None:
            states_ptr += before * (H * P * N)
            totals_ptr += before * H
        if export_ptr is not None:
            export_ptr += export_slot * (H * P * N)
        dtype: gl.constexpr = x_desc.dtype
        xs = gl.allocate_shared_memory(dtype, [STAGES * HEADS, CHUNK, P], x_desc.layout)
        Bs = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, N], B_desc.layout)
        Cs = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, N], C_desc.layout)
        abs_ = gl.allocate_shared_memory(gl.float32, [STAGES, HEADS, 2 * CHUNK], ab_desc.layout)
        m_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, CHUNK], dtype)
        ws = gl.allocate_shared_memory(gl.float32, [STAGES, HEADS, 2 * CHUNK], ab_desc.layout)
        ms = gl.allocate_shared_memory(dtype, [_SCORES * HEADS, CHUNK, CHUNK], m_layout)
        ys = gl.allocate_shared_memory(dtype, [HEADS, CHUNK, P], y_desc.layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        weighed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        scored = gl.allocate_shared_memory(gl.int64, [_SCORES, 1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [_SCORES, 1], mbarrier.MBarrierLayout())
        z_bars = gl.allocate_shared_memory(gl.int64, [HEADS, 1], mbarrier.MBarrierLayout())
        for s in gl.static_range(STAGES):
            mbarrier.init(full.index(s), count=1)
            mbarrier.init(weighed.index(s), count=1)
            mbarrier.init(empty.index(s), count=HEADS)
        for s in gl.static_range(_SCORES):
            mbarrier.init(scored.index(s), count=1)
            mbarrier.init(taken.index(s), count=HEADS)
        for s in gl.static_range(HEADS):
            mbarrier.init(z_bars.index(s), count=1)
        fence_async_shared()
        gl.thread_barrier()
        first_row = (row + k * size).to(gl.int32)
        first_chunk = (chunk + k * chunks_per_piece).to(gl.int32)
        group = h // (H // G) * N
        first_token = token.to(gl.int32)
        left = (end - token).to(gl.int32)
        pieces = (k * splits).to(gl.int32)
        done = (k * size).to(gl.int32)
        length = (end - begin).to(gl.int32)
        # A tuple that is given a name turns its constants into tensors, so each stands where it is used.
        if HEADS == 2:
            gl.warp_specialize(
                [
                    (_scan, (
                        y_desc, z_desc, xs, Bs, Cs, ws, ms, ys, full, empty, weighed, scored, taken, z_bars, D_ptr,
                        y_ptr, initial_ptr, states_ptr, totals_ptr, final_ptr, export_ptr, first_token, left, chunks, h,
                        target, final_stride, pieces, done, length,
                        H, P, N, D_PER_HEADDIM, SCANNED, EXPORT, HEADS, STAGES, 0,
                    )),
                    (_scan, (
                        y_desc, z_desc, xs, Bs, Cs, ws, ms, ys, full, empty, weighed, scored, taken, z_bars, D_ptr,
                        y_ptr, initial_ptr, states_ptr, totals_ptr, final_ptr, export_ptr, first_token, left, chunks, h,
                        target, final_stride, pieces, done, length,
                        H, P, N, D_PER_HEADDIM, SCANNED, EXPORT, HEADS, STAGES, 1,
                    )),
                    (_score, (Bs, Cs, abs_, ms, full, scored, taken, chunks, HEADS, STAGES)),
                    (_weigh, (abs_, ws, full, weighed, chunks, HEADS, STAGES)),
                    (_load, (
                        x_desc, B_desc, C_desc, ab_desc, xs, Bs, Cs, abs_, full, empty, first_row, first_chunk, chunks,
                        h, group, H, P, N, HEADS, STAGES,
                    )),
                ],
                [4, 4, 1, 1],
                [200, 80, 32, 32],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (_scan, (
                        y_desc, z_desc, xs, Bs, Cs, ws, ms, ys, full, empty, weighed, scored, taken, z_bars, D_ptr,
                        y_ptr, initial_ptr, states_ptr, totals_ptr, final_ptr, export_ptr, first_token, left, chunks, h,
                        target, final_stride, pieces, done, length,
                        H, P, N, D_PER_HEADDIM, SCANNED, EXPORT, HEADS, STAGES, 0,
                    )),
                    (_score, (Bs, Cs, abs_, ms, full, scored, taken, chunks, HEADS, STAGES)),
                    (_weigh, (abs_, ws, full, weighed, chunks, HEADS, STAGES)),
                    (_load, (
                        x_desc, B_desc, C_desc, ab_desc, xs, Bs, Cs, abs_, full, empty, first_row, first_chunk, chunks,
                        h, group, H, P, N, HEADS, STAGES,
                    )),
                ],
                [4, 1, 1],
                [160, 40, 40],
            )  # fmt: skip
