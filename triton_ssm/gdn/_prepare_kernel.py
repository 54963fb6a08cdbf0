# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
# A jitted function is Gluon's language in Python's syntax; the types are Gluon's too.
"""All of a chunk that needs no state, for HEADS value heads of one key head. For Hopper, in Gluon; four warps.

    G = cumsum(g)    P = mask_{j<=i}(q_i·k_j·exp(G_i - G_j))    A = mask_{j<i}(beta_i·k_i·k_j·exp(G_i - G_j))
    w = (I + A)^-1 (beta·exp(G)·k)      u = (I + A)^-1 (beta·v)

What is rounded to q's dtype: q and k where they are normalised; P; the inverse; beta·exp(G)·k and beta·v as operands; w and u.
Tiles are asked for all at once, by copies that go past the registers, the second head's v when the first's has left its place.
Tokens may lie any multiple of 16 numbers apart. Registers and shared memory are for three programs an SM: one waits while
others compute.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .._numerics import LOG2E
from ..ssd._fused_gluon_pieces import CHUNK, chunk_in_slot, exp
from ._prepare_inverse import halves, invert, put, room

_EPS = gl.constexpr(1e-6)
# HEADS rows for each: beta·exp(G), beta, G in powers of two.
_GROWN, _BETA, _SUM = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@gluon.constexpr_function
def _tile(WIDTH):
    """[64, WIDTH] of 16-bit numbers, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])


@gluon.jit
def _offsets(stride, WIDTH: gl.constexpr, layout: gl.constexpr):
    i = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    return i[:, None] * stride + d[None, :]


@gluon.jit
def _fetch(tile, pointer, stride, length, WIDTH: gl.constexpr, layout: gl.constexpr):
    """To shared memory. Rows past the end are zero: they are other sequences', which may be NaN."""
    live = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout)) < length
    async_copy.async_copy_global_to_shared(tile, pointer + _offsets(stride, WIDTH, layout), mask=live[:, None])
    async_copy.commit_group()


@gluon.jit
def _store(pointer, x):
    """A dense tile. As one row, whose addresses are one register and a constant each."""
    SIZE: gl.constexpr = x.shape[0] * x.shape[1]
    x = gl.reshape(x, (SIZE,))
    gl.store(pointer + gl.arange(0, SIZE, layout=x.type.layout), x)


@gluon.jit
def _wide(x):
    """To fp32; of bf16 by two instructions a pair, where the compiler takes three."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(gl.float32)


@gluon.jit
def _norm(tile, pointer, keep, layout: gl.constexpr, L2NORM: gl.constexpr):
    """In place; and to memory."""
    x = tile.load(layout)
    if L2NORM:
        wide = _wide(x)
        x = (wide * gl.rsqrt(gl.sum(wide * wide, axis=1) + _EPS)[:, None]).to(x.dtype)
        tile.store(x)
    if keep:
        _store(pointer, x)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _gates(g_ptr, g_stride, beta_ptr, beta_stride, gates_ptr, sums, length, HEADS: gl.constexpr):
    """The heads' running sums and weights to shared memory, their decays to the second kernel."""
    # Every warp has all of it: no sum crosses warps.
    layout: gl.constexpr = gl.BlockedLayout([HEADS, 2], [1, 32], [4, 1], [1, 0])
    r = gl.arange(0, HEADS, layout=gl.SliceLayout(1, layout))[:, None]
    i = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout))[None, :]
    live = (i < length) & (r >= 0)
    g = gl.load(g_ptr + r + i * g_stride, mask=live, other=0.0).to(gl.float32)
    beta = gl.load(beta_ptr + r + i * beta_stride, mask=live, other=0.0).to(gl.float32)
    G = gl.associative_scan(g, 1, _add)
    last = gl.sum(gl.where(i == CHUNK - 1, G, 0.0), axis=1)
    grown = exp(G)
    gates_ptr += r * (2 * CHUNK) + i
    gl.store(gates_ptr, grown)
    gl.store(gates_ptr + CHUNK, exp(last[:, None] - G))
    _rows(sums, _GROWN, HEADS).store(beta * grown)
    _rows(sums, _BETA, HEADS).store(beta)
    _rows(sums, _SUM, HEADS).store(G * LOG2E)


@gluon.jit
def _rows(sums, kind: gl.constexpr, HEADS: gl.constexpr):
    """Of all heads."""
    dense: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return sums._reinterpret(gl.float32, [4 * HEADS, CHUNK], dense).slice(kind * HEADS, HEADS)


@gluon.jit
def _lower(x, DIAGONAL: gl.constexpr):
    """The lower triangle, by a select: what stands above it may be infinite."""
    i = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, x.type.layout))[:, None]
    j = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, x.type.layout))[None, :]
    return gl.where(i >= j if DIAGONAL else i > j, x, 0.0)


@gluon.jit
def _triangles(qk, kk, sums, r: gl.constexpr, HEADS: gl.constexpr):
    """(P, A) of lower triangles. Masked before the exp, for gates may be of either sign."""
    rows: gl.constexpr = gl.SliceLayout(1, qk.type.layout)
    G = sums.index(_SUM * HEADS + r)
    decay = gl.exp2(_lower(G.load(rows)[:, None] - G.load(gl.SliceLayout(0, qk.type.layout))[None, :], True))
    return qk * decay, kk * sums.index(_BETA * HEADS + r).load(rows)[:, None] * decay


@gluon.jit
def _product(X, rows, weights, tile, pointer, WIDTH: gl.constexpr, layout: gl.constexpr):
    """X·(weights·rows), rounded, to memory. `tile`: shared memory for the operand and then for the result."""
    weight = weights.load(gl.SliceLayout(1, layout))
    tile.store((_wide(rows.load(layout)) * weight[:, None]).to(tile.dtype))
    fence_async_shared()
    gl.thread_barrier()
    acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    product = warpgroup_mma(X, tile, gl.zeros((CHUNK, WIDTH), gl.float32, acc), use_acc=False, is_async=True)
    product = warpgroup_mma_wait(0, deps=[product])
    # Every warp has read all of the operand.
    gl.thread_barrier()
    tile.store(product.to(tile.dtype))
    _store(pointer, tile.load(layout))


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1. (Strides of q, k and
# v are multiples of 16 without exception, from which follows that 16 bytes can be copied at once.)
@gluon.jit(
    do_not_specialize=["n_tokens", "n_chunks", "n_sequences", "g_batch_stride", "beta_batch_stride"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)
def gdn_prepare_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, cu_seqlens_ptr, q_out_ptr, k_out_ptr, w_ptr, u_ptr, P_ptr, gates_ptr,
    n_tokens, n_chunks, n_sequences,
    q_batch_stride, k_batch_stride, v_batch_stride, g_batch_stride, beta_batch_stride,
    q_stride, k_stride, v_stride, g_stride, beta_stride,
    H_K: gl.constexpr, H_V: gl.constexpr, K: gl.constexpr, V: gl.constexpr, L2NORM: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    # Heads are the fastest axis of the grid: programs that run together read neighbouring memory. Offsets are 64-bit: q, k and
    # v may have more than 2^31 elements.
    slot = (gl.program_id(0) // (H_V // HEADS)).to(gl.int64)
    h = gl.program_id(0) % (H_V // HEADS) * HEADS
    h_k = h // (H_V // H_K)
    b, begin, end, _ = chunk_in_slot(cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, False)
    length = gl.minimum(end - begin, CHUNK).to(gl.int32)
    if length <= 0:
        return

    dtype: gl.constexpr = q_ptr.dtype.element_ty
    k_layout: gl.constexpr = _tile(K)
    v_layout: gl.constexpr = _tile(V)
    q_ptr += b * q_batch_stride + begin * q_stride + h_k * K
    k_ptr += b * k_batch_stride + begin * k_stride + h_k * K
    v_ptr += b * v_batch_stride + begin * v_stride + h * V
    g_ptr += b * g_batch_stride + begin * g_stride + h
    beta_ptr += b * beta_batch_stride + begin * beta_stride + h
    place = slot * H_V + h
    k_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, K], dtype)
    v_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, V], dtype)
    q_s = gl.allocate_shared_memory(dtype, [CHUNK, K], k_tile)
    k_s = gl.allocate_shared_memory(dtype, [CHUNK, K], k_tile)
    v_s = gl.allocate_shared_memory(dtype, [CHUNK, V], v_tile)
    # All asked for before the first is waited for.
    _fetch(q_s, q_ptr, q_stride, length, K, k_layout)
    _fetch(k_s, k_ptr, k_stride, length, K, k_layout)
    _fetch(v_s, v_ptr, v_stride, length, V, v_layout)
    # Without it the compiler has the gates first, and waits for them before it asks for a tile.
    gl.thread_barrier()
    sums = gl.allocate_shared_memory(gl.float32, [4 * HEADS, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gates_ptr += place * (2 * CHUNK)
    _gates(g_ptr, g_stride, beta_ptr, beta_stride, gates_ptr, sums, length, HEADS)

    keep = h % (H_V // H_K) == 0
    row = (slot * H_K + h_k) * (CHUNK * K)
    async_copy.wait_group(2)
    gl.thread_barrier()
    _norm(q_s, q_out_ptr + row, keep, k_layout, L2NORM)
    async_copy.wait_group(1)
    gl.thread_barrier()
    _norm(k_s, k_out_ptr + row, keep, k_layout, L2NORM)
    fence_async_shared()
    gl.thread_barrier()
    acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    nothing = gl.zeros((CHUNK, CHUNK), gl.float32, acc)
    qk = warpgroup_mma(q_s, k_s.permute((1, 0)), nothing, use_acc=False, is_async=True)
    kk = warpgroup_mma(k_s, k_s.permute((1, 0)), nothing, use_acc=False, is_async=True)
    qk, kk = warpgroup_mma_wait(0, deps=[qk, kk])
    qk = _lower(qk, True)
    kk = _lower(kk, False)

    P_layout: gl.constexpr = _tile(CHUNK // 2)
    diagonal, left, corner = room(HEADS)
    for r in gl.static_range(HEADS):
        P, A = _triangles(qk, kk, sums, r, HEADS)
        put(A, diagonal, left, corner, r)
        P = P.to(dtype)
        near, far = halves(P)
        P_place = P_ptr + (place + r) * (CHUNK * CHUNK)
        gl.store(P_place + _offsets(CHUNK, CHUNK // 2, P_layout), gl.convert_layout(near, P_layout))
        gl.store(P_place + (CHUNK // 2) + _offsets(CHUNK, CHUNK // 2, P_layout), gl.convert_layout(far, P_layout))
    X = invert(diagonal, left, corner, HEADS)
    X_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, CHUNK], dtype)
    X = gl.reshape(X.to(dtype), (HEADS * CHUNK, CHUNK))
    X_s = gl.allocate_shared_memory(dtype, [HEADS * CHUNK, CHUNK], X_tile, X)
    w_tile = gl.allocate_shared_memory(dtype, [CHUNK, K], k_tile)
    for r in gl.static_range(HEADS):
        X = X_s.slice(r * CHUNK, CHUNK)
        async_copy.wait_group(0)
        gl.thread_barrier()
        u = u_ptr + (place + r) * (CHUNK * V)
        _product(X, v_s, sums.index(_BETA * HEADS + r), v_s, u, V, v_layout)
        if r + 1 < HEADS:
            # Every thread has taken its part of u from there.
            gl.thread_barrier()
            _fetch(v_s, v_ptr + (r + 1) * V, v_stride, length, V, v_layout)
        w = w_ptr + (place + r) * (CHUNK * K)
        _product(X, k_s, sums.index(_GROWN * HEADS + r), w_tile, w, K, k_layout)
