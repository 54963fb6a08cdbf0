# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
# A jitted function is Gluon's language in Python's syntax; the types are Gluon's too.
"""`fused_state_kernel` for Hopper, in Gluon: the end state of one piece of HEADS neighbouring heads of a group.

One warp loads chunks by TMA into a ring, the last chunk first, and one computes the tokens' weights; each head has a warpgroup
of its own, and they share B. x^T, weighted, is a register operand: it is waited for before the registers serve again.
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

from ._fused_gluon_pieces import CHUNK, bound, row_of, sequence_of_slot


@gluon.jit
def _load(
    x_desc, B_desc, ab_desc, xs, Bs, abs_, full, empty, row, chunk, chunks, h, group,
    H: gl.constexpr, P: gl.constexpr, N: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    size: gl.constexpr = (HEADS * P + N) * CHUNK * 2 + HEADS * 2 * CHUNK * 4
    for back in range(chunks):
        stage = back % STAGES
        mbarrier.wait(empty.index(stage), (back // STAGES & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, size)
        c = chunks - 1 - back
        tma.async_copy_global_to_shared(ab_desc, [(chunk + c) * H + h, 0], bar, abs_.index(stage))
        tma.async_copy_global_to_shared(B_desc, [row + c * CHUNK, group], bar, Bs.index(stage))
        for i in gl.static_range(HEADS):
            tma.async_copy_global_to_shared(x_desc, [row + c * CHUNK, (h + i) * P], bar, xs.index(stage * HEADS + i))


@gluon.jit
def _weigh(
    abs_, ws, full, weighed, totals_ptr, chunks, HEADS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """2^(the piece's decay after token j)·dt[j], once for all threads of a head's warpgroup."""
    layout: gl.constexpr = gl.BlockedLayout([2, 1], [32, 1], [1, 1], [0, 1])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    heads = gl.arange(0, HEADS, layout=gl.SliceLayout(0, layout))[None, :]
    after = gl.zeros((1, HEADS), gl.float32, layout)
    for back in range(chunks):
        stage = back % STAGES
        mbarrier.wait(full.index(stage), back // STAGES & 1)
        ab = row_of(abs_, stage, HEADS)
        w = row_of(ws, stage, HEADS)
        total = gl.zeros((1, HEADS), gl.float32, layout)
        for i in gl.static_range(HEADS):
            own = gl.sum(ab.slice(i * 2 * CHUNK + CHUNK - 1, 1).load(rows), axis=0)
            before = gl.sum(gl.where(heads == i, after, 0.0), axis=1)
            b = ab.slice((i * 2 + 1) * CHUNK, CHUNK).load(rows)
            w.slice(i * CHUNK, CHUNK).store(gl.exp2(own + before - b))
            total = gl.where(heads == i, own, total)
        after += total
        gl.thread_barrier()
        mbarrier.arrive(weighed.index(stage))
    gl.store(totals_ptr + heads, after)


@gluon.jit
def _sum(
    xs, Bs, ws, full, weighed, empty, states_ptr, chunks,
    P: gl.constexpr, N: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, i: gl.constexpr,
):  # fmt: skip
    """The warpgroup of a head. Half a chunk at a time: its weights are applied under the product of the other half."""
    mS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    aS: gl.constexpr = gl.DotOperandLayout(0, mS, 2)
    HALF: gl.constexpr = CHUNK // 2
    state = gl.zeros((P, N), gl.float32, mS)
    for back in range(chunks):
        stage = back % STAGES
        x = xs.index(stage * HEADS + i)
        B = Bs.index(stage)
        w = row_of(ws, stage, HEADS)
        mbarrier.wait(full.index(stage), back // STAGES & 1)
        mbarrier.wait(weighed.index(stage), back // STAGES & 1)
        # Nothing is in flight; but where ptxas cannot see that, it waits once more at a worse place.
        state = warpgroup_mma_wait(0, deps=[state])
        weight = w.slice(i * CHUNK, HALF).load(gl.SliceLayout(0, aS))
        early = (x.slice(0, HALF).permute((1, 0)).load(aS).to(gl.float32) * weight[None, :]).to(xs.dtype)
        state = warpgroup_mma(early, B.slice(0, HALF), state, is_async=True)
        weight = w.slice(i * CHUNK + HALF, HALF).load(gl.SliceLayout(0, aS))
        late = (x.slice(HALF, HALF).permute((1, 0)).load(aS).to(gl.float32) * weight[None, :]).to(xs.dtype)
        state = warpgroup_mma(late, B.slice(HALF, HALF), state, is_async=True)
        state, early, late = warpgroup_mma_wait(0, deps=[state, early, late])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(stage))
    p = gl.arange(0, P, layout=gl.SliceLayout(1, mS))
    d = gl.arange(0, N, layout=gl.SliceLayout(0, mS))
    gl.store(states_ptr + i * (P * N) + p[:, None] * N + d[None, :], state)


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1.
@gluon.jit(
    do_not_specialize=[
        "n_tokens", "chunks_per_row", "states_per_row", "rows_per_row", "n_sequences", "chunks_per_state", "splits",
    ]
)  # fmt: skip
def fused_state_kernel_hopper(
    states_ptr, totals_ptr, ab_desc, x_desc, B_desc, cu_seqlens_ptr,
    n_tokens, chunks_per_row, states_per_row, rows_per_row, n_sequences, chunks_per_state, splits,
    H: gl.constexpr, G: gl.constexpr, P: gl.constexpr, N: gl.constexpr, ALIGNED: gl.constexpr,
    HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    h = gl.program_id(0) % (H // HEADS) * HEADS
    slot = gl.program_id(0) // (H // HEADS)
    size = chunks_per_state * CHUNK
    if cu_seqlens_ptr is None:
        n = slot // states_per_row
        wide = n.to(gl.int64)
        begin = wide * n_tokens
        end = begin + n_tokens
        q = (slot % states_per_row).to(gl.int64)
        chunk = wide * chunks_per_row
        row = wide * rows_per_row
    else:
        n = sequence_of_slot(cu_seqlens_ptr, slot, size, n_sequences, n_tokens, 0)
        begin = bound(cu_seqlens_ptr, n, n_tokens)
        end = gl.maximum(bound(cu_seqlens_ptr, gl.minimum(n + 1, n_sequences), n_tokens), begin)
        q = slot - begin // size
        chunk = begin // CHUNK + n
        row = begin
        if ALIGNED > 0:
            row = (begin // ALIGNED + n) * ALIGNED
    if ALIGNED == 0:
        row = begin
    # As `needed_pieces`: those that an output piece comes after.
    piece = size * splits
    needed = gl.maximum((end - begin + piece - 1) // piece - 1, 0) * splits
    if (n < n_sequences) & (q >= 0) & (q < needed):
        dtype: gl.constexpr = x_desc.dtype
        xs = gl.allocate_shared_memory(dtype, [STAGES * HEADS, CHUNK, P], x_desc.layout)
        Bs = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, N], B_desc.layout)
        abs_ = gl.allocate_shared_memory(gl.float32, [STAGES, HEADS, 2 * CHUNK], ab_desc.layout)
        ws = gl.allocate_shared_memory(gl.float32, [STAGES, HEADS, 2 * CHUNK], ab_desc.layout)
        weighed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for s in gl.static_range(STAGES):
            mbarrier.init(full.index(s), count=1)
            mbarrier.init(weighed.index(s), count=1)
            mbarrier.init(empty.index(s), count=HEADS)
        fence_async_shared()
        gl.thread_barrier()
        first_row = (row + q * size).to(gl.int32)
        first_chunk = (chunk + q * chunks_per_state).to(gl.int32)
        group = h // (H // G) * N
        place = slot.to(gl.int64) * H + h
        states_ptr += place * (P * N)
        totals_ptr += place
        # A tuple that is given a name turns its constants into tensors, so each stands where it is used.
        if HEADS == 2:
            gl.warp_specialize(
                [
                    (_sum, (xs, Bs, ws, full, weighed, empty, states_ptr, chunks_per_state, P, N, HEADS, STAGES, 0)),
                    (_sum, (xs, Bs, ws, full, weighed, empty, states_ptr, chunks_per_state, P, N, HEADS, STAGES, 1)),
                    (_weigh, (abs_, ws, full, weighed, totals_ptr, chunks_per_state, HEADS, STAGES)),
                    (_load, (
                        x_desc, B_desc, ab_desc, xs, Bs, abs_, full, empty, first_row, first_chunk, chunks_per_state, h,
                        group, H, P, N, HEADS, STAGES,
                    )),
                ],
                [4, 1, 1],
                [152, 40, 40],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (_sum, (xs, Bs, ws, full, weighed, empty, states_ptr, chunks_per_state, P, N, HEADS, STAGES, 0)),
                    (_weigh, (abs_, ws, full, weighed, totals_ptr, chunks_per_state, HEADS, STAGES)),
                    (_load, (
                        x_desc, B_desc, ab_desc, xs, Bs, abs_, full, empty, first_row, first_chunk, chunks_per_state, h,
                        group, H, P, N, HEADS, STAGES,
                    )),
                ],
                [1, 1],
                [40, 40],
            )  # fmt: skip
