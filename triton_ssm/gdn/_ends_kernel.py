# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# A jitted function is Gluon's language in Python's syntax; the types are Gluon's too.
"""What segments of chunks do to a state, S -> T·S + E, for Hopper: 64 columns of [E | T] of one segment and value head.

`_loop_kernel` without its outputs: E is the state after a segment that starts with zero, and T that after one which starts with
the identity and whose v are zero. As there, S^T is in a warpgroup's registers in fp32, a warp feeds it by TMA STAGES chunks
ahead, and h and r are rounded to k's dtype; for hazards see it too.

Segments are of whole chunks: the last one of a sequence, which may have a tail, has nobody after it and is not here.
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

from ..ssd._fused_gluon_pieces import CHUNK, row_of
from ._loop_kernel import COLUMNS, _elements
from ._prepare_kernel import GATE_ROWS, wide


@gluon.jit
def _feed(
    k_desc, v_desc, Y_desc, gates_desc, k_s, v_s, Y_s, gates_s, full, empty, slot, token, chunks, h, column,
    H_K: gl.constexpr, H_V: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    size: gl.constexpr = (2 * K + COLUMNS) * CHUNK * 2 + GATE_ROWS * 2 * CHUNK * 4
    key_column = h // (H_V // H_K) * K
    for c in range(chunks):
        stage = c % STAGES
        mbarrier.wait(empty.index(stage), (c // STAGES & 1) ^ 1, pred=c >= STAGES)
        # v and the gates were read by ordinary instructions.
        fence_async_shared()
        bar = full.index(stage)
        mbarrier.expect(bar, size)
        head = (slot + c) * H_V + h
        first = token + c * CHUNK
        tma.async_copy_global_to_shared(k_desc, [first, key_column], bar, k_s.index(stage))
        tma.async_copy_global_to_shared(gates_desc, [head * GATE_ROWS, 0], bar, gates_s.index(stage))
        tma.async_copy_global_to_shared(v_desc, [first, column], bar, v_s.index(stage))
        tma.async_copy_global_to_shared(Y_desc, [head * CHUNK, 0], bar, Y_s.index(stage))


@gluon.jit
def _carry(
    k_s, v_s, Y_s, gates_s, full, empty, ends_ptr, chunks, diagonal,
    K: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """diagonal: the column of S that the first one here is; none where that is negative."""
    mT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    mS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    aT: gl.constexpr = gl.DotOperandLayout(0, mT, 2)
    aS: gl.constexpr = gl.DotOperandLayout(0, mS, 2)
    dtype: gl.constexpr = k_s.dtype
    nothing = gl.zeros((COLUMNS, CHUNK), gl.float32, mT)
    rows = gl.arange(0, K, layout=gl.SliceLayout(0, mS))[None, :]
    own = diagonal + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, mS))[:, None]
    state = gl.where(rows == own, 1.0, 0.0)
    mbarrier.wait(full.index(0), 0)
    for c in range(chunks):
        stage = c % STAGES
        state = warpgroup_mma_wait(0, deps=[state])
        before = gl.convert_layout(state.to(dtype), aT)
        known = warpgroup_mma(before, k_s.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        gates = row_of(gates_s, stage, GATE_ROWS)
        total = gl.sum(gates.slice(2 * CHUNK, 1).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)
        v = v_s.index(stage).permute((1, 0)).load(mT)
        # All warps are past the last chunk's end.
        gl.thread_barrier()
        mbarrier.arrive(empty.index((c + STAGES - 1) % STAGES), pred=c > 0)
        # After that: Triton has another barrier before whatever reads shared memory next, which is better here than later.
        known_gate = gates.slice(CHUNK, CHUNK).load(gl.SliceLayout(0, mT))
        # With what can be had before: the compiler would compute it later, while all wait for it.
        known, state, v, before = warpgroup_mma_wait(0, deps=[known, state * total, wide(v), before])
        r = gl.convert_layout((v - known * known_gate[None, :]).to(dtype), aT)
        r = gl.convert_layout(r, aS)  # the same registers
        state = warpgroup_mma(r, Y_s.index(stage), state, is_async=True)
        mbarrier.wait(full.index((c + 1) % STAGES), (c + 1) // STAGES & 1, pred=c + 1 < chunks)
        state, r = warpgroup_mma_wait(0, deps=[state, r])
    gl.store(ends_ptr + _elements(K, WIDTH, mS), state)


@gluon.jit(do_not_specialize=["n_tokens", "n_chunks", "n_segments", "segment_chunks"])
def gdn_ends_kernel_hopper(
    ends_ptr, k_desc, v_desc, Y_desc, gates_desc, n_tokens, n_chunks, n_segments, segment_chunks,
    H_K: gl.constexpr, H_V: gl.constexpr, K: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """ends [B·(n_segments - 1), H_v, K, V + K] in fp32: rows of E, then of T."""
    WIDTH: gl.constexpr = V + K
    PARTS: gl.constexpr = WIDTH // COLUMNS
    part = gl.program_id(0) % PARTS
    h = gl.program_id(0) // PARTS % H_V
    place = gl.program_id(0) // (PARTS * H_V)
    n = place // (n_segments - 1)
    first = place % (n_segments - 1) * segment_chunks
    dtype: gl.constexpr = k_desc.dtype
    k_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, K], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, COLUMNS], v_desc.layout)
    Y_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, K], Y_desc.layout)
    gates_s = gl.allocate_shared_memory(gl.float32, [STAGES, GATE_ROWS, 2 * CHUNK], gates_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    fence_async_shared()
    gl.thread_barrier()
    ends_ptr += (place.to(gl.int64) * H_V + h) * (K * WIDTH) + part * COLUMNS
    slot = n * n_chunks + first
    token = n * n_tokens + first * CHUNK
    diagonal = part * COLUMNS - V
    # Columns past v's last are zero in shared memory.
    column = gl.where(diagonal < 0, h * V + part * COLUMNS, H_V * V)
    gl.warp_specialize(
        [
            (_carry, (k_s, v_s, Y_s, gates_s, full, empty, ends_ptr, segment_chunks, diagonal, K, WIDTH, STAGES)),
            (_feed, (
                k_desc, v_desc, Y_desc, gates_desc, k_s, v_s, Y_s, gates_s, full, empty, slot, token, segment_chunks, h,
                column, H_K, H_V, K, STAGES,
            )),
        ],
        [1],
        [72],
    )  # fmt: skip
