# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# A jitted function is Gluon's language in Python's syntax; the types are Gluon's too.
"""The fused path's second kernel, for Hopper: the state of one value head's 64 or 128 columns through a sequence's chunks, and
the outputs on the way.

Two roles, tied by barriers of shared memory:

    carry   a warpgroup for every 64 columns, S^T [64, K] in its registers in fp32; with h the state before the chunk, rounded,
            and PX, Y and the gates those of `_prepare_kernel`
                r^T = v^T - fk·exp(G)·(h^T k^T)
                o^T = scale·fq·exp(G)·(h^T q^T) + r^T PX^T
                S^T = exp(G_last)·S^T + r^T Y
    feed    one warp: tiles of q, k, v, PX, Y and the gates by TMA, STAGES chunks ahead, and o out

Transposed, the state and r are left operands, which tensor cores take from registers: neither passes through shared memory.
One warpgroup has the shorter chain, chunk after chunk; two share all tiles but v's, and one's arithmetic runs under the other's
products, which pays once there are more programs than SMs. Either way every number is computed alike. What is rounded to q's
dtype: h, r and o.

A dense sequence may come as segments of chunks, which programs of their own start with the states of `_between_kernel`.

q, k and v are the caller's own, so a sequence's last tiles may have rows of others, even NaN. Those of k and v are dead columns
of r^T, which a select clears, and the parts of PX and Y that they would meet are zero; those of q make rows of o that nobody
stores.

Hazards. A product with a register operand is waited for with that operand among `deps`, so that its registers do not serve
again while tensor cores read them; no product is in flight over a loop's edge. One thread arrives for a warpgroup: a barrier
of all its warps stands between their last access and that. What the carrying warpgroup writes or reads with ordinary
instructions is fenced by the feeding warp before TMA reads or overwrites it, which keeps the fence out of the chain.
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

from ..ssd._fused_gluon_pieces import CHUNK, bound, row_of
from ._prepare_kernel import GATE_ROWS, wide

# Columns of v that one warpgroup carries.
COLUMNS = gl.constexpr(64)


@gluon.jit
def _feed(
    q_desc, k_desc, v_desc, PX_desc, Y_desc, gates_desc, o_desc, o_ptr,
    q_s, k_s, v_s, PX_s, Y_s, gates_s, o_s, full, empty, slot, token, length, chunks, h, part,
    H_K: gl.constexpr, H_V: gl.constexpr, K: gl.constexpr, V: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    size: gl.constexpr = (3 * K + WARPGROUPS * COLUMNS + CHUNK) * CHUNK * 2 + GATE_ROWS * 2 * CHUNK * 4
    column = h * V + part * (WARPGROUPS * COLUMNS)
    key_column = h // (H_V // H_K) * K
    for c in range(chunks + STAGES):
        stage = c % STAGES
        if c >= STAGES:
            # The chunk that was here is done: its o leaves, and its tiles make room.
            mbarrier.wait(empty.index(stage), (c // STAGES & 1) ^ 1)
            fence_async_shared()
            first = (c - STAGES) * CHUNK
            for i in range(WARPGROUPS):
                tile = o_s.index(stage * WARPGROUPS + i)
                if length - first >= CHUNK:
                    tma.async_copy_shared_to_global(o_desc, [token + first, column + i * COLUMNS], tile)
                else:
                    _store_rows(tile, o_ptr, token + first, length - first, column + i * COLUMNS, H_V * V)
        if c < chunks:
            bar = full.index(stage)
            mbarrier.expect(bar, size)
            head = (slot + c) * H_V + h
            first = token + c * CHUNK
            tma.async_copy_global_to_shared(k_desc, [first, key_column], bar, k_s.index(stage))
            tma.async_copy_global_to_shared(gates_desc, [head * GATE_ROWS, 0], bar, gates_s.index(stage))
            tma.async_copy_global_to_shared(q_desc, [first, key_column], bar, q_s.index(stage))
            tma.async_copy_global_to_shared(PX_desc, [head * CHUNK, 0], bar, PX_s.index(stage))
            tma.async_copy_global_to_shared(Y_desc, [head * CHUNK, 0], bar, Y_s.index(stage))
            # v says that the stage is full: o's tile has been read by then, and may be written again.
            tma.store_wait(0)
            for i in gl.static_range(WARPGROUPS):
                tile = v_s.index(stage * WARPGROUPS + i)
                tma.async_copy_global_to_shared(v_desc, [first, column + i * COLUMNS], bar, tile)
    tma.store_wait(0)


@gluon.jit
def _anew(index):
    """`index`, of which the compiler does not know that it is the same every time: addresses made of it would be kept in
    registers that a loop needs."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [index], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _store_rows(tile, o_ptr, token, live, column, o_stride: gl.constexpr):
    """The first `live` rows, by the feeding warp."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    columns = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    for first in gl.static_range(0, CHUNK, 16):
        rows = first + _anew(gl.arange(0, 16, layout=gl.SliceLayout(1, layout)))
        place = o_ptr + (token + rows).to(gl.int64)[:, None] * o_stride + columns[None, :]
        gl.store(place, tile.slice(first, 16).load(layout), mask=(rows < live)[:, None])


@gluon.jit
def _elements(K: gl.constexpr, V: gl.constexpr, layout: gl.constexpr):
    """Where the elements of S^T stand in a state [K,V]."""
    v = _anew(gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, layout)))
    return gl.arange(0, K, layout=gl.SliceLayout(0, layout))[None, :] * V + v[:, None]


@gluon.jit
def _carry(
    q_s, k_s, v_s, PX_s, Y_s, gates_s, o_s, full, empty, initial_ptr, final_ptr, length, is_last,
    K: gl.constexpr, V: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, i: gl.constexpr,
):  # fmt: skip
    """The warpgroup of the program's i-th columns. Pointers to states are those of the program's."""
    mT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    mS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    aT: gl.constexpr = gl.DotOperandLayout(0, mT, 2)
    aS: gl.constexpr = gl.DotOperandLayout(0, mS, 2)
    dtype: gl.constexpr = k_s.dtype
    chunks = (length + (CHUNK - 1)) // CHUNK
    columns = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, mT))
    nothing = gl.zeros((COLUMNS, CHUNK), gl.float32, mT)
    state = gl.zeros((COLUMNS, K), gl.float32, mS)
    if initial_ptr is not None:
        state = gl.load(initial_ptr + i * COLUMNS + _elements(K, V, mS)).to(gl.float32)
    mbarrier.wait(full.index(0), 0, pred=chunks > 0)
    for c in range(chunks):
        stage = c % STAGES
        # Nothing is in flight; but where ptxas cannot see that, it waits once more at a worse place.
        state = warpgroup_mma_wait(0, deps=[state])
        before = gl.convert_layout(state.to(dtype), aT)
        known = warpgroup_mma(before, k_s.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        # A product with a register operand holds its warp for most of its time: what comes from memory is asked for before.
        gates = row_of(gates_s, stage, GATE_ROWS)
        known_gate = gates.slice(CHUNK, CHUNK).load(gl.SliceLayout(0, mT))
        total = gl.sum(gates.slice(2 * CHUNK, 1).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)
        v = v_s.index(stage * WARPGROUPS + i).permute((1, 0)).load(mT)
        # All warps are past the last chunk's end.
        gl.thread_barrier()
        mbarrier.arrive(empty.index((c + STAGES - 1) % STAGES), pred=c > 0)
        carried = warpgroup_mma(before, q_s.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        # With what can be had before: the compiler would compute it later, while all wait for it.
        known, state, v = warpgroup_mma_wait(1, deps=[known, state * total, wide(v)])
        fresh = v - known * known_gate[None, :]
        if length - c * CHUNK < CHUNK:
            # A select: no token, no value, whatever stands where it would be and though the state were infinite.
            fresh = gl.where((columns < length - c * CHUNK)[None, :], fresh, 0.0)
        r = gl.convert_layout(fresh.to(dtype), aT)
        r_again = gl.convert_layout(r, aS)  # the same registers
        within = warpgroup_mma(r, PX_s.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        state = warpgroup_mma(r_again, Y_s.index(stage), state, is_async=True)
        carried, within, before = warpgroup_mma_wait(1, deps=[carried, within, before])
        o = carried * gates.slice(0, CHUNK).load(gl.SliceLayout(0, mT))[None, :] + within
        o_s.index(stage * WARPGROUPS + i).permute((1, 0)).store(o.to(dtype))
        mbarrier.wait(full.index((c + 1) % STAGES), (c + 1) // STAGES & 1, pred=c + 1 < chunks)
        state, r, r_again = warpgroup_mma_wait(0, deps=[state, r, r_again])
    gl.thread_barrier()
    mbarrier.arrive(empty.index((chunks + STAGES - 1) % STAGES), pred=chunks > 0)
    if final_ptr is not None:
        if is_last != 0:
            gl.store(final_ptr + i * COLUMNS + _elements(K, V, mS), state)


@gluon.jit
def _blank(o_ptr, begin, end, column, o_stride: gl.constexpr, WIDTH: gl.constexpr):
    """Zeros in rows of o that belong to no sequence."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    columns = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    rows = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
    nothing = gl.zeros((CHUNK, WIDTH), o_ptr.dtype.element_ty, layout)
    for token in range(begin, end, CHUNK):
        place = o_ptr + (token + rows).to(gl.int64)[:, None] * o_stride + columns[None, :]
        gl.store(place, nothing, mask=(token + rows < end)[:, None])


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1; nor where the
# bounds begin, which may be a slice of the batch's.
@gluon.jit(
    do_not_specialize=["n_tokens", "n_chunks", "n_sequences", "n_segments", "segment_chunks"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)  # fmt: skip
def gdn_loop_kernel_hopper(
    o_ptr, q_desc, k_desc, v_desc, PX_desc, Y_desc, gates_desc, o_desc, initial_ptr, final_ptr, cu_seqlens_ptr,
    n_tokens, n_chunks, n_sequences, n_segments, segment_chunks,
    H_K: gl.constexpr, H_V: gl.constexpr, K: gl.constexpr, V: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """o [B,T,H_v,V]; initial [N_seq·n_segments,H_v,K,V] of any dtype; final [N_seq,H_v,K,V] in fp32. Programs of a head read
    q, k, PX and Y together, through the L2 cache.

    n_segments: of `segment_chunks` chunks but for the last, in every sequence. Few sequences have more than one, dense ones
    that one warpgroup a program serves.
    """
    PARTS: gl.constexpr = V // (WARPGROUPS * COLUMNS)
    part = gl.program_id(0) % PARTS
    h = gl.program_id(0) // PARTS % H_V
    n = gl.program_id(0) // (PARTS * H_V)
    # Of the states that sequences and segments begin with.
    segment, is_last = n, 1
    if cu_seqlens_ptr is not None:
        begin = bound(cu_seqlens_ptr, n, n_tokens)
        end = gl.maximum(bound(cu_seqlens_ptr, gl.minimum(n + 1, n_sequences), n_tokens), begin)
        slot = (begin // CHUNK).to(gl.int32) + n
    elif WARPGROUPS == 2:
        begin = n.to(gl.int64) * n_tokens
        end = begin + n_tokens
        slot = n * n_chunks
    else:
        n = segment // n_segments
        first = segment % n_segments * segment_chunks
        is_last = (first + segment_chunks >= n_chunks).to(gl.int32)
        begin = n.to(gl.int64) * n_tokens
        end = begin + gl.minimum((first + segment_chunks) * CHUNK, n_tokens)
        begin += first * CHUNK
        slot = n * n_chunks + first
    if n < n_sequences:
        dtype: gl.constexpr = k_desc.dtype
        q_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, K], q_desc.layout)
        k_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, K], k_desc.layout)
        v_s = gl.allocate_shared_memory(dtype, [STAGES * WARPGROUPS, CHUNK, COLUMNS], v_desc.layout)
        PX_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, CHUNK], PX_desc.layout)
        Y_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, K], Y_desc.layout)
        # With two warpgroups o takes the place of v, which each warp has read of the same elements that it writes.
        o_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, COLUMNS], o_desc.layout) if WARPGROUPS == 1 else v_s
        gates_s = gl.allocate_shared_memory(gl.float32, [STAGES, GATE_ROWS, 2 * CHUNK], gates_desc.layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for s in gl.static_range(STAGES):
            mbarrier.init(full.index(s), count=1)
            mbarrier.init(empty.index(s), count=WARPGROUPS)
        fence_async_shared()
        gl.thread_barrier()
        columns = part * (WARPGROUPS * COLUMNS)
        if initial_ptr is not None:
            initial_ptr += (segment.to(gl.int64) * H_V + h) * (K * V) + columns
        if final_ptr is not None:
            final_ptr += (n.to(gl.int64) * H_V + h) * (K * V) + columns
        token = begin.to(gl.int32)
        length = (end - begin).to(gl.int32)
        chunks = (length + (CHUNK - 1)) // CHUNK
        # A tuple that is given a name turns its constants into tensors, so each stands where it is used.
        if WARPGROUPS == 2:
            gl.warp_specialize(
                [
                    (_carry, (
                        q_s, k_s, v_s, PX_s, Y_s, gates_s, o_s, full, empty, initial_ptr, final_ptr, length, is_last,
                        K, V, WARPGROUPS, STAGES, 0,
                    )),
                    (_carry, (
                        q_s, k_s, v_s, PX_s, Y_s, gates_s, o_s, full, empty, initial_ptr, final_ptr, length, is_last,
                        K, V, WARPGROUPS, STAGES, 1,
                    )),
                    (_feed, (
                        q_desc, k_desc, v_desc, PX_desc, Y_desc, gates_desc, o_desc, o_ptr,
                        q_s, k_s, v_s, PX_s, Y_s, gates_s, o_s, full, empty, slot, token, length, chunks, h, part,
                        H_K, H_V, K, V, WARPGROUPS, STAGES,
                    )),
                ],
                [4, 1],
                [232, 40],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (_carry, (
                        q_s, k_s, v_s, PX_s, Y_s, gates_s, o_s, full, empty, initial_ptr, final_ptr, length, is_last,
                        K, V, WARPGROUPS, STAGES, 0,
                    )),
                    (_feed, (
                        q_desc, k_desc, v_desc, PX_desc, Y_desc, gates_desc, o_desc, o_ptr,
                        q_s, k_s, v_s, PX_s, Y_s, gates_s, o_s, full, empty, slot, token, length, chunks, h, part,
                        H_K, H_V, K, V, WARPGROUPS, STAGES,
                    )),
                ],
                [1],
                [72],
            )  # fmt: skip
    elif cu_seqlens_ptr is not None:
        _blank(
            o_ptr, begin, n_tokens.to(gl.int64), h * V + part * (WARPGROUPS * COLUMNS), H_V * V, WARPGROUPS * COLUMNS
        )
