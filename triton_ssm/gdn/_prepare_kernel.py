# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
# A jitted function is Gluon's language in Python's syntax; the types are Gluon's too.
"""All of a chunk that needs no state, for HEADS value heads of one key head. For Hopper, in Gluon; four warps.

    G  = cumsum(g)      fq, fk = rsqrt(Σ q^2 + 1e-6), rsqrt(Σ k^2 + 1e-6), or 1 without L2NORM
    P  = mask_{j<=i}(scale·fq_i·fk_j·q_i·k_j·exp(G_i - G_j))      A = mask_{j<i}(beta_i·fk_i·fk_j·k_i·k_j·exp(G_i - G_j))
    X  = (I + A)^-1·diag(beta)      PX = P·X      Y = (diag(d)·X)^T·k      d_i = fk_i·exp(G_last - G_i)

With r_i = v_i - fk_i·exp(G_i)·h^T k_i of the state h before the chunk, o = scale·fq·exp(G)·(q h) + PX·r and the state after it
is exp(G_last)·h + Y^T·r: the second kernel needs no more, and reads q, k and v itself. What is rounded to q's dtype: P; X and
diag(d)·X; PX and Y. Nothing is before a product: norms, gates and beta are factors in fp32.

Both tiles are asked for at once, by copies that go past the registers. Tokens may lie any multiple of 16 bytes apart.
Registers and shared memory are for three programs an SM: one waits while others compute.
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
from ._prepare_inverse import invert, put, room

_EPS = gl.constexpr(1e-6)
# Of [.., 128] gates, those of one head and chunk: scale·fq·exp(G), fk·exp(G); exp(G_last) as often, and what nobody reads.
GATE_ROWS = gl.constexpr(2)
# HEADS rows of shared memory for each: beta, G in powers of two, d.
_BETA, _SUM, _UNTIL_END = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
# Of 16 bits.
_COPIED = gl.constexpr(8)


@gluon.constexpr_function
def _tile(WIDTH):
    """[64, WIDTH] of 16-bit numbers, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])


@gluon.jit
def _fetch(tile, pointer, stride, length, WIDTH: gl.constexpr):
    """To shared memory. Rows past the end are zero: they are other sequences', which may be NaN."""
    layout: gl.constexpr = _tile(WIDTH)
    i = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    place = pointer + (i[:, None] * stride + d[None, :])
    async_copy.async_copy_global_to_shared(tile, place, mask=(i < length)[:, None])
    async_copy.commit_group()


@gluon.jit
def _store(pointer, x, tile, WIDTH: gl.constexpr):
    """A dense tile, rounded, by way of shared memory. To memory as one row, whose addresses are one register and a constant
    each."""
    tile.store(x.to(tile.dtype))
    rows = gl.reshape(tile.load(_tile(WIDTH)), (CHUNK * WIDTH,))
    gl.store(pointer + gl.arange(0, CHUNK * WIDTH, layout=rows.type.layout), rows)


@gluon.jit
def wide(x):
    """To fp32; of bf16 by two instructions a pair, where the compiler takes three."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(gl.float32)


@gluon.jit
def _factors(tile, to, scale, L2NORM: gl.constexpr):
    """`scale` times what makes a row's norm 1."""
    # Four threads of a row: eight neighbours of one column read from all banks of a swizzled tile.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [0, 1])
    factor = gl.zeros((CHUNK,), gl.float32, gl.SliceLayout(1, layout)) + scale
    if L2NORM:
        x = wide(tile.load(layout))
        factor = factor * gl.rsqrt(gl.sum(x * x, axis=1) + _EPS)
    to.store(factor)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _cumulated(g_ptr, g_stride, beta_ptr, beta_stride, sums, length, HEADS: gl.constexpr):
    """G [HEADS,64], which goes to shared memory, with beta."""
    # Every warp has all of it: no sum crosses warps.
    layout: gl.constexpr = gl.BlockedLayout([HEADS, 2], [1, 32], [4, 1], [1, 0])
    r = gl.arange(0, HEADS, layout=gl.SliceLayout(1, layout))[:, None]
    i = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout))[None, :]
    live = (i < length) & (r >= 0)
    g = gl.load(g_ptr + r + i * g_stride, mask=live, other=0.0).to(gl.float32)
    beta = gl.load(beta_ptr + r + i * beta_stride, mask=live, other=0.0).to(gl.float32)
    G = gl.associative_scan(g, 1, _add)
    _rows(sums, _BETA, HEADS).store(beta)
    _rows(sums, _SUM, HEADS).store(G * LOG2E)
    return G


@gluon.jit
def _gates(G, fq, fk, sums, gates_ptr, HEADS: gl.constexpr):
    """The heads' rows of gates to memory, d to shared memory."""
    layout: gl.constexpr = G.type.layout
    r = gl.arange(0, HEADS, layout=gl.SliceLayout(1, layout))[:, None]
    i = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout))[None, :]
    fq = fq.load(gl.SliceLayout(0, layout))[None, :]
    fk = fk.load(gl.SliceLayout(0, layout))[None, :]
    last = gl.sum(gl.where(i == CHUNK - 1, G, 0.0), axis=1)[:, None]
    grown = exp(G)
    gates_ptr += r * (GATE_ROWS * 2 * CHUNK) + i
    gl.store(gates_ptr, fq * grown)
    gl.store(gates_ptr + CHUNK, fk * grown)
    gl.store(gates_ptr + 2 * CHUNK, exp(last))
    _rows(sums, _UNTIL_END, HEADS).store(fk * exp(last - G))


@gluon.jit
def _rows(sums, kind: gl.constexpr, HEADS: gl.constexpr):
    """Of all heads."""
    dense: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return sums._reinterpret(gl.float32, [4 * HEADS, CHUNK], dense).slice(kind * HEADS, HEADS)


@gluon.jit
def _triangles(qk, kk, fk, sums, r: gl.constexpr, HEADS: gl.constexpr):
    """(P, A), zero above the diagonal; what A has on it, nobody reads."""
    rows: gl.constexpr = gl.SliceLayout(1, qk.type.layout)
    columns: gl.constexpr = gl.SliceLayout(0, qk.type.layout)
    i = gl.arange(0, CHUNK, layout=rows)[:, None]
    j = gl.arange(0, CHUNK, layout=columns)[None, :]
    G = sums.index(_SUM * HEADS + r)
    # Masked before the exp, for gates may be of either sign.
    decay = gl.exp2(gl.where(i >= j, G.load(rows)[:, None] - G.load(columns)[None, :], float("-inf")))
    strength = sums.index(_BETA * HEADS + r).load(rows) * fk.load(rows)
    return qk * decay, kk * strength[:, None] * decay


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1. (q's and k's tokens
# are counted in what is copied at once.)
@gluon.jit(
    do_not_specialize=[
        "n_tokens", "n_chunks", "n_sequences", "q_copies", "k_copies", "g_batch_stride", "beta_batch_stride",
    ],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)  # fmt: skip
def gdn_prepare_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, cu_seqlens_ptr, PX_ptr, Y_ptr, gates_ptr, n_tokens, n_chunks, n_sequences, scale,
    q_copies, k_copies, g_batch_stride, beta_batch_stride, g_stride, beta_stride,
    H_K: gl.constexpr, H_V: gl.constexpr, K: gl.constexpr, L2NORM: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """q_copies, k_copies: 16 bytes from token to token of q and k, whose batch rows follow one another."""
    # Heads are the fastest axis of the grid: programs that run together read neighbouring memory. Offsets are 64-bit: q and k
    # may have more than 2^31 elements.
    slot = (gl.program_id(0) // (H_V // HEADS)).to(gl.int64)
    h = gl.program_id(0) % (H_V // HEADS) * HEADS
    h_k = h // (H_V // H_K)
    b, begin, end, _ = chunk_in_slot(cu_seqlens_ptr, slot, n_chunks, n_sequences, n_tokens, False)
    length = gl.minimum(end - begin, CHUNK).to(gl.int32)
    if length <= 0:
        return

    dtype: gl.constexpr = q_ptr.dtype.element_ty
    token = b * n_tokens + begin
    q_ptr += token * q_copies * _COPIED + h_k * K
    k_ptr += token * k_copies * _COPIED + h_k * K
    g_ptr += b * g_batch_stride + begin * g_stride + h
    beta_ptr += b * beta_batch_stride + begin * beta_stride + h
    place = slot * H_V + h
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, K], dtype)
    q_s = gl.allocate_shared_memory(dtype, [CHUNK, K], tile)
    k_s = gl.allocate_shared_memory(dtype, [CHUNK, K], tile)
    _fetch(q_s, q_ptr, q_copies * _COPIED, length, K)
    _fetch(k_s, k_ptr, k_copies * _COPIED, length, K)
    # Without it the compiler has the gates first, and waits for them before it asks for a tile.
    gl.thread_barrier()
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sums = gl.allocate_shared_memory(gl.float32, [4 * HEADS, CHUNK], row)
    factors = gl.allocate_shared_memory(gl.float32, [2, CHUNK], row)
    fq, fk = factors.index(0), factors.index(1)
    G = _cumulated(g_ptr, g_stride, beta_ptr, beta_stride, sums, length, HEADS)

    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()
    acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    nothing = gl.zeros((CHUNK, CHUNK), gl.float32, acc)
    qk = warpgroup_mma(q_s, k_s.permute((1, 0)), nothing, use_acc=False, is_async=True)
    kk = warpgroup_mma(k_s, k_s.permute((1, 0)), nothing, use_acc=False, is_async=True)
    _factors(q_s, fq, scale, L2NORM)
    _factors(k_s, fk, 1.0, L2NORM)
    _gates(G, fq, fk, sums, gates_ptr + place * (GATE_ROWS * 2 * CHUNK), HEADS)
    # With the first tile, or other things might be put in its place while tensor cores still read it.
    qk, kk, _ = warpgroup_mma_wait(0, deps=[qk, kk, q_s])
    fk_columns = fk.load(gl.SliceLayout(0, acc))[None, :]
    qk = qk * fq.load(gl.SliceLayout(1, acc))[:, None] * fk_columns
    kk = kk * fk_columns

    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, CHUNK], dtype)
    P_s = gl.allocate_shared_memory(dtype, [HEADS * CHUNK, CHUNK], square)
    diagonal, left, corner = room(HEADS)
    for r in gl.static_range(HEADS):
        P, A = _triangles(qk, kk, fk, sums, r, HEADS)
        put(A, diagonal, left, corner, r)
        P_s.slice(r * CHUNK, CHUNK).store(P.to(dtype))
    X = invert(diagonal, left, corner, HEADS)
    layout: gl.constexpr = X.type.layout
    X = X * gl.expand_dims(_rows(sums, _BETA, HEADS).load(gl.SliceLayout(1, layout)), 1)
    weighted = X * gl.expand_dims(_rows(sums, _UNTIL_END, HEADS).load(gl.SliceLayout(2, layout)), 2)
    X = gl.reshape(X.to(dtype), (HEADS * CHUNK, CHUNK))
    weighted = gl.reshape(weighted.to(dtype), (HEADS * CHUNK, CHUNK))
    X_s = gl.allocate_shared_memory(dtype, [HEADS * CHUNK, CHUNK], square, X)
    weighted_s = gl.allocate_shared_memory(dtype, [HEADS * CHUNK, CHUNK], square, weighted)
    fence_async_shared()
    gl.thread_barrier()
    for r in gl.static_range(HEADS):
        P_tile = P_s.slice(r * CHUNK, CHUNK)
        PX = warpgroup_mma(P_tile, X_s.slice(r * CHUNK, CHUNK), nothing, use_acc=False, is_async=True)
        PX = warpgroup_mma_wait(0, deps=[PX])
        # Every warp has read all of P, whose place PX takes.
        gl.thread_barrier()
        _store(PX_ptr + (place + r) * (CHUNK * CHUNK), PX, P_tile, CHUNK)
    acc_wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    # In the place of all that is done with.
    Y_s = gl.allocate_shared_memory(dtype, [CHUNK, K], tile)
    for r in gl.static_range(HEADS):
        left = weighted_s.slice(r * CHUNK, CHUNK).permute((1, 0))
        Y = warpgroup_mma(left, k_s, gl.zeros((CHUNK, K), gl.float32, acc_wide), use_acc=False, is_async=True)
        Y = warpgroup_mma_wait(0, deps=[Y])
        _store(Y_ptr + (place + r) * (CHUNK * K), Y, Y_s, K)
