# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `selective_state_update`: a block of BLOCK_SIZE_M rows of headdim by the whole dstate, read and written once.

The operator moves 2·P·N state elements a head and does next to nothing with them, so the tile is shaped for 16-byte
accesses along N, and everything else (a few hundred bytes) is loaded while the state is on its way.
"""

import triton
import triton.language as tl

from ._numerics import exp, silu, softplus
from ._slots import is_slot
from ._stochastic_rounding import random_bits, stochastic_round


@triton.jit
def _load_token(
    x_ptr, dt_ptr, B_ptr, C_ptr, z_ptr, dt_bias_ptr, t, x_stride, dt_stride, B_stride, C_stride, z_stride,
    h, p, cols, in_headdim, in_dstate,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    TIED_DT: tl.constexpr, TIED_DT_BIAS: tl.constexpr, TIED_STEP: tl.constexpr,
):  # fmt: skip
    """x, dt + dt_bias, B, C and z of one token and head, in fp32. The step is a scalar when tied, else one for each row."""
    if TIED_STEP:
        step = tl.load(dt_ptr + t * dt_stride + h).to(tl.float32)
        if dt_bias_ptr is not None:
            step += tl.load(dt_bias_ptr + h).to(tl.float32)
    else:
        each = p * 0 + h if TIED_DT else h * P + p
        step = tl.load(dt_ptr + t * dt_stride + each, mask=in_headdim, other=0.0).to(tl.float32)
        if dt_bias_ptr is not None:
            each_bias = p * 0 + h if TIED_DT_BIAS else h * P + p
            step += tl.load(dt_bias_ptr + each_bias, mask=in_headdim, other=0.0).to(tl.float32)
    g = h // (H // G)
    x = tl.load(x_ptr + t * x_stride + h * P + p, mask=in_headdim, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + t * B_stride + g * N + cols, mask=in_dstate, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + t * C_stride + g * N + cols, mask=in_dstate, other=0.0).to(tl.float32)
    z = x
    if z_ptr is not None:
        z = tl.load(z_ptr + t * z_stride + h * P + p, mask=in_headdim, other=0.0).to(tl.float32)
    return x, step, B, C, z


@triton.jit
def _step(
    state, x, step, A, B, C, D, z,
    TIED_STEP: tl.constexpr, TIED_A: tl.constexpr, DT_SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """The recurrence: the new state tile and y."""
    if DT_SOFTPLUS:
        step = softplus(step)
    if TIED_STEP:
        decay = exp(A * step)
    elif TIED_A:
        decay = exp(A * step)[:, None]
    else:
        decay = exp(A * step[:, None])
    state = state * decay + (step * x)[:, None] * B[None, :]
    y = tl.sum(state * C[None, :], axis=1)
    if HAS_D:
        y += D * x
    if HAS_Z:
        y *= silu(z)
    return state, y


@triton.jit
def _store_state(
    state_ptr, state, tile, mask, slot, slot_stride, rows, seed_ptr,
    H: tl.constexpr, P: tl.constexpr, BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = state_ptr.dtype.element_ty
    if seed_ptr is None:
        rounded = state.to(dtype)
    else:
        bits = random_bits(seed_ptr, slot * H * P + rows, BLOCK_SIZE_M, BLOCK_SIZE_N)
        rounded = stochastic_round(state, bits, dtype)
    tl.store(state_ptr + slot * slot_stride + tile, rounded, mask=mask)


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1; nor where
# an index array begins, which may be a slice of the batch's.
@triton.jit(
    do_not_specialize=["n_tokens", "n_sequences", "n_slots", "null_slot"],
    do_not_specialize_on_alignment=["source_ptr", "target_ptr", "cu_seqlens_ptr", "accepted_ptr", "seed_ptr"],
)
def selective_state_update_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dt_bias_ptr, y_ptr,
    source_ptr, target_ptr, cu_seqlens_ptr, accepted_ptr, seed_ptr,
    n_tokens, n_sequences, n_slots, null_slot,
    slot_stride, x_stride, dt_stride, B_stride, C_stride, z_stride, y_stride,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, T_MAX: tl.constexpr,
    TIED_DT: tl.constexpr, TIED_DT_BIAS: tl.constexpr, TIED_A: tl.constexpr, TIED_D: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_M: tl.constexpr,
):  # fmt: skip
    TIED_STEP: tl.constexpr = TIED_DT and TIED_DT_BIAS
    BLOCKS: tl.constexpr = (P + BLOCK_SIZE_M - 1) // BLOCK_SIZE_M
    SPECULATIVE: tl.constexpr = accepted_ptr is not None
    HAS_D: tl.constexpr = D_ptr is not None
    HAS_Z: tl.constexpr = z_ptr is not None

    # Offsets are 64-bit: a pool of 2100 slots of Nemotron-H-8B has more than 2^31 elements.
    pid = tl.program_id(0)
    n = (pid // (BLOCKS * H)).to(tl.int64)
    h = ((pid // BLOCKS) % H).to(tl.int64)
    p = (pid % BLOCKS) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    cols = tl.arange(0, BLOCK_SIZE_N)
    in_headdim, in_dstate = p < P, cols < N
    in_tile = in_headdim[:, None] & in_dstate[None, :]
    tile = h * (P * N) + (p[:, None] * N + cols[None, :])
    row = h * P + p

    if cu_seqlens_ptr is None:
        begin, end = n, n + 1
        some = True
    else:
        # Bounds are data: whatever they hold, no row outside [0, n_tokens) is touched. Without a sequence the one program
        # a head has is there for the padding rows alone.
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + n).to(tl.int64), 0), n_tokens)
        end = tl.load(cu_seqlens_ptr + tl.minimum(n + 1, n_sequences)).to(tl.int64)
        end = tl.minimum(tl.maximum(end, begin), n_tokens)
        last = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + n_sequences).to(tl.int64), 0), n_tokens)
        for t in range(last + n, n_tokens, tl.maximum(n_sequences, 1)):
            tl.store(y_ptr + t * y_stride + row, tl.zeros((BLOCK_SIZE_M,), y_ptr.dtype.element_ty), mask=in_headdim)
        some = begin < end

    slot = n
    if source_ptr is not None:
        if SPECULATIVE:
            accepted = tl.load(accepted_ptr + n, mask=some, other=0).to(tl.int64)
            column = tl.minimum(tl.maximum(accepted - 1, 0), T_MAX - 1)
            slot = tl.load(source_ptr + n * T_MAX + column, mask=some, other=-1).to(tl.int64)
        else:
            slot = tl.load(source_ptr + n, mask=some, other=-1).to(tl.int64)
    target = slot
    if not SPECULATIVE and target_ptr is not None:
        target = tl.load(target_ptr + n, mask=some, other=-1).to(tl.int64)
    padding = (slot < 0) | (slot == null_slot)
    live = is_slot(slot, null_slot, n_slots)
    if not SPECULATIVE:
        live = live & (target < n_slots)

    A = tl.load(A_ptr + h) if TIED_A else tl.load(A_ptr + tile, mask=in_tile, other=0.0)
    A = A.to(tl.float32)
    D = 0.0
    if HAS_D:
        D = tl.load(D_ptr + h) if TIED_D else tl.load(D_ptr + row, mask=in_headdim, other=0.0)
        D = D.to(tl.float32)

    if cu_seqlens_ptr is None:
        # One token: its operands are asked for before the state, which has to wait for the slot.
        x, step, B, C, z = _load_token(
            x_ptr, dt_ptr, B_ptr, C_ptr, z_ptr, dt_bias_ptr, n, x_stride, dt_stride, B_stride, C_stride, z_stride,
            h, p, cols, in_headdim, in_dstate, H, G, P, N, TIED_DT, TIED_DT_BIAS, TIED_STEP)  # fmt: skip
        state = tl.load(state_ptr + slot * slot_stride + tile, mask=in_tile & live, other=0.0).to(tl.float32)
        state, y = _step(state, x, step, A, B, C, D, z, TIED_STEP, TIED_A, DT_SOFTPLUS, HAS_D, HAS_Z)
        if SPECULATIVE:
            target = tl.load((source_ptr if target_ptr is None else target_ptr) + n * T_MAX).to(tl.int64)
            live = live & (target < n_slots)
        y = tl.where(live, y, tl.where(padding, 0.0, float("nan")))
        tl.store(y_ptr + n * y_stride + row, y.to(y_ptr.dtype.element_ty), mask=in_headdim)
    else:
        state = tl.load(state_ptr + slot * slot_stride + tile, mask=in_tile & live & some, other=0.0).to(tl.float32)
        for t in range(begin, end):
            x, step, B, C, z = _load_token(
                x_ptr, dt_ptr, B_ptr, C_ptr, z_ptr, dt_bias_ptr, t, x_stride, dt_stride, B_stride, C_stride, z_stride,
                h, p, cols, in_headdim, in_dstate, H, G, P, N, TIED_DT, TIED_DT_BIAS, TIED_STEP)  # fmt: skip
            state, y = _step(state, x, step, A, B, C, D, z, TIED_STEP, TIED_A, DT_SOFTPLUS, HAS_D, HAS_Z)
            good = live
            if SPECULATIVE:
                # Tokens past T_max have no slot: they are computed and their state is not kept.
                to = tl.load((source_ptr if target_ptr is None else target_ptr) + n * T_MAX + (t - begin),
                             mask=t - begin < T_MAX, other=-1).to(tl.int64)  # fmt: skip
                good = live & (to < n_slots)
                _store_state(state_ptr, state, tile, in_tile & live & is_slot(to, null_slot, n_slots), to, slot_stride,
                             row, seed_ptr, H, P, BLOCK_SIZE_M, BLOCK_SIZE_N)  # fmt: skip
            y = tl.where(good, y, tl.where(padding, 0.0, float("nan")))
            tl.store(y_ptr + t * y_stride + row, y.to(y_ptr.dtype.element_ty), mask=in_headdim)
    if cu_seqlens_ptr is None or not SPECULATIVE:
        _store_state(state_ptr, state, tile, in_tile & live & some & is_slot(target, null_slot, n_slots), target,
                     slot_stride, row, seed_ptr, H, P, BLOCK_SIZE_M, BLOCK_SIZE_N)  # fmt: skip
