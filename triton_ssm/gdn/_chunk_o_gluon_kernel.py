# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
# A jitted function is Gluon's language in Python's syntax; the types are Gluon's too.
"""`chunk_o_kernel` for Hopper, in Gluon: a warpgroup computes one chunk of HEADS value heads of a query and key head.

The operator reads three times what its products would take, so everything here is about memory: q·k^T is computed once for
those heads, everything that fits is asked for by TMA before the first wait, a unit of work is 64 columns of a head's v and h,
STAGES of them under way at a time, and shared memory is small enough for two programs an SM, of which one loads while the
other multiplies. Outputs leave through the memory of k, which nobody reads after q·k^T.

Hazards. P is a register operand: it is waited for among `deps` before its registers serve again. Every barrier is for one
tile or pair of tiles and completes once, so that there are no phases to count. Shared memory that threads wrote is fenced
before tensor cores or TMA read it, and all warps meet before one thread starts a copy over memory that they read or wrote.
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

from ..ssd._fused_gluon_pieces import CHUNK, chunk_in_slot, exp

TILE = gl.constexpr(64)
"""Columns of the output that are computed at a time."""
_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""Of a [64,64] tile on its way to or from memory: 16 bytes a thread."""


@gluon.jit
def _tile_rows(o_ptr, row, length, STRIDE: gl.constexpr):
    """(pointers, mask) of a [64,64] tile of o: the first `length` rows from `row` on."""
    i = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, _ROWS))[:, None]
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, _ROWS))[None, :]
    return o_ptr + row * STRIDE + (i * STRIDE + columns), (i < length) & (columns >= 0)


@gluon.jit
def _clear_rows(tile, length):
    """Zeros in the rows from `length` on: other sequences' tokens, whose NaN a product with 0 would keep."""
    i = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, _ROWS))
    value = tile.load(_ROWS)
    tile.store(gl.where((i < length)[:, None], value, gl.zeros_like(value)))


@gluon.jit
def _fetch_v(v_desc, v, bar, row, first_head, unit: gl.constexpr, V: gl.constexpr):
    """Asks for 64 columns of a head's v."""
    tma.async_copy_global_to_shared(v_desc, [row, first_head * V + unit * TILE], bar, v)


@gluon.jit
def _fetch_h(
    h_desc, h, bar, first_state, unit: gl.constexpr, K: gl.constexpr, V: gl.constexpr, V_FIRST: gl.constexpr
):  # fmt: skip
    """Asks for the same columns of its state."""
    state = first_state + unit // (V // TILE)
    column: gl.constexpr = unit % (V // TILE) * TILE
    if V_FIRST:
        tma.async_copy_global_to_shared(h_desc, [state * V + column, 0], bar, h)
    else:
        tma.async_copy_global_to_shared(h_desc, [state * K, column], bar, h)


@gluon.jit
def _power(x, BASE_2: gl.constexpr):
    return gl.exp2(x) if BASE_2 else exp(x)


@gluon.jit
def _decayed(products, pairs, gates, BASE_2: gl.constexpr):
    """(products, each times the decay between its tokens, where `pairs`; the decay since the chunk began)."""
    down = gates.load(gl.SliceLayout(1, products.type.layout))
    across = gates.load(gl.SliceLayout(0, products.type.layout))
    # Masked before the exp: a gate may be of either sign.
    difference = gl.where(pairs, down[:, None] - across[None, :], 0.0)
    return products * _power(difference, BASE_2), _power(down, BASE_2)


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1; nor where an
# index array begins, which may be a slice of the batch's.
@gluon.jit(
    do_not_specialize=["n_tokens", "n_chunks", "n_sequences", "q_rows", "k_rows", "v_rows"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "g_ptr"],
)
def chunk_o_kernel_hopper(
    o_ptr, q_desc, k_desc, v_desc, h_desc, o_desc, g_ptr, cu_seqlens_ptr,
    n_tokens, n_chunks, n_sequences, q_rows, k_rows, v_rows, scale,
    H_K: gl.constexpr, H_V: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BASE_2: gl.constexpr, V_FIRST: gl.constexpr,
    HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """HEADS divides H_V // H_K. `q_rows`, …: tokens from batch row to batch row, in rows of the descriptor."""
    # Heads are the fastest axis of the grid: neighbours read neighbouring columns of the same tokens.
    h = gl.program_id(0) % (H_V // HEADS) * HEADS
    slot = gl.program_id(0) // (H_V // HEADS)
    b, begin, end, padding = chunk_in_slot(cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, True)
    length = gl.maximum(gl.minimum(end - begin, CHUNK), 0).to(gl.int32)
    row = b * n_tokens + begin
    if length == 0:
        return
    if padding:
        for part in range(HEADS * (V // TILE)):
            place, mask = _tile_rows(o_ptr + (h * V + part * TILE), row, length, H_V * V)
            gl.store(place, gl.zeros((CHUNK, TILE), o_ptr.dtype.element_ty, _ROWS), mask=mask)
        return

    PARTS: gl.constexpr = V // TILE
    UNITS: gl.constexpr = HEADS * PARTS
    PIECES: gl.constexpr = K // TILE
    dtype: gl.constexpr = q_desc.dtype
    UNIT: gl.constexpr = (CHUNK + K) * TILE * 2
    q = gl.allocate_shared_memory(dtype, [CHUNK, K], q_desc.layout)
    k = gl.allocate_shared_memory(dtype, [CHUNK, K], k_desc.layout)
    # The compiler keeps all uses of a buffer apart by barriers of all warps, so each unit has buffers of its own.
    vs, hs, arrived = (), (), ()
    for _ in gl.static_range(STAGES):
        vs += (gl.allocate_shared_memory(dtype, [CHUNK, TILE], v_desc.layout),)
        hs += (gl.allocate_shared_memory(dtype, [TILE, K] if V_FIRST else [K, TILE], h_desc.layout),)
    for _ in gl.static_range(UNITS):
        arrived += (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    for unit in gl.static_range(UNITS):
        mbarrier.init(arrived[unit], count=1)
    fence_async_shared()
    gl.thread_barrier()

    h_k = h // (H_V // H_K)
    states = slot * H_V + h
    v_row = (b * v_rows + begin).to(gl.int32)
    mbarrier.expect(ready, 2 * CHUNK * K * 2)
    for unit in gl.static_range(STAGES):
        mbarrier.expect(arrived[unit], UNIT)
    # Two copies to one barrier do not follow each other either.
    tma.async_copy_global_to_shared(q_desc, [(b * q_rows + begin).to(gl.int32), h_k * K], ready, q)
    for unit in gl.static_range(STAGES):
        _fetch_v(v_desc, vs[unit], arrived[unit], v_row, h, unit, V)
    tma.async_copy_global_to_shared(k_desc, [(b * k_rows + begin).to(gl.int32), h_k * K], ready, k)
    for unit in gl.static_range(STAGES):
        _fetch_h(h_desc, hs[unit], arrived[unit], states, unit, K, V, V_FIRST)

    mP: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    aP: gl.constexpr = gl.DotOperandLayout(0, mP, 2)
    i = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, mP))
    j = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, mP))
    # A token past the chunk's end is a column of no row that is written, so that causality alone decides.
    pairs = i[:, None] >= j[None, :]
    if g_ptr is not None:
        # From memory once for all threads, whose rows and columns then come from shared memory.
        ROOM: gl.constexpr = HEADS if HEADS <= 2 else (4 if HEADS <= 4 else 8)
        own: gl.constexpr = gl.BlockedLayout([1, 1], [ROOM, 32 // ROOM], [1, 4], [0, 1])
        r = gl.arange(0, ROOM, layout=gl.SliceLayout(1, own))[:, None]
        t = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, own))[None, :]
        g = gl.load(g_ptr + (row * H_V + h) + (t * H_V + r), mask=(r < HEADS) & (t < length), other=0.0)
        gs = gl.allocate_shared_memory(gl.float32, [ROOM, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        gs.store(g)
        gates = gs._reinterpret(gl.float32, [ROOM * CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    mbarrier.wait(ready, 0)
    nothing = gl.zeros((CHUNK, CHUNK), gl.float32, mP)
    products = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(0, deps=[products])
    gl.thread_barrier()
    outs = k._reinterpret(dtype, [PIECES, CHUNK, TILE], o_desc.layout)
    for unit in gl.static_range(UNITS):
        if unit % PARTS == 0:
            weights = products
            if g_ptr is not None:
                weights, since = _decayed(products, pairs, gates.slice(unit // PARTS * CHUNK, CHUNK), BASE_2)
            P = gl.convert_layout(gl.where(pairs, weights, 0.0).to(dtype), aP)
        v = vs[unit % STAGES]
        state = hs[unit % STAGES]
        mbarrier.wait(arrived[unit], 0)
        if length < CHUNK:
            _clear_rows(v, length)
            fence_async_shared()
            gl.thread_barrier()
        carried = warpgroup_mma(q, state.permute((1, 0)) if V_FIRST else state, nothing, use_acc=False, is_async=True)
        inner = warpgroup_mma(P, v, nothing, use_acc=False, is_async=True)
        carried, inner, P = warpgroup_mma_wait(0, deps=[carried, inner, P])
        if g_ptr is not None:
            carried = carried * since[:, None]
        # The output that left from this piece has been read.
        if unit >= PIECES:
            tma.store_wait(PIECES - 1)
        out = outs.index(unit % PIECES)
        out.store(((carried + inner) * scale).to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        if unit + STAGES < UNITS:
            mbarrier.expect(arrived[unit + STAGES], UNIT)
            _fetch_v(v_desc, v, arrived[unit + STAGES], v_row, h, unit + STAGES, V)
            _fetch_h(h_desc, state, arrived[unit + STAGES], states, unit + STAGES, K, V, V_FIRST)
        column = h * V + unit * TILE
        if length < CHUNK:
            place, mask = _tile_rows(o_ptr + column, row, length, H_V * V)
            gl.store(place, out.load(_ROWS), mask=mask)
            gl.thread_barrier()
        else:
            tma.async_copy_shared_to_global(o_desc, [row.to(gl.int32), column], out)
    tma.store_wait(0)
