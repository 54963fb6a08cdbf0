# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A jitted function is Triton's language in Python's syntax; the types are Triton's too.
"""The kernel of `fused_recurrent_gated_delta_rule`: BLOCK_SIZE_V columns of one head's state, read and written once.

The operator moves 2·K·V state elements a head and does next to nothing with them: whole columns, so that both of a token's
sums over K stay in the program, and everything else (a few hundred bytes) is loaded while the state is on its way.
"""

import triton
import triton.language as tl

from .._numerics import exp, softplus
from .._slots import is_slot
from ._l2norm_kernel import unit


@triton.jit
def _load_token(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, dt_bias_ptr, A, t, q_stride, k_stride, v_stride, g_stride, beta_stride,
    h, d, v, in_K, in_V,
    H_K: tl.constexpr, H_V: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATED: tl.constexpr, L2NORM: tl.constexpr,
    SIGMOID_BETA: tl.constexpr,
):  # fmt: skip
    """q, k, v, the decay and beta of one token and head, in fp32."""
    h_k = h // (H_V // H_K)
    q = tl.load(q_ptr + t * q_stride + h_k * K + d, mask=in_K, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + t * k_stride + h_k * K + d, mask=in_K, other=0.0).to(tl.float32)
    value = tl.load(v_ptr + t * v_stride + h * V + v, mask=in_V, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + t * g_stride + h).to(tl.float32)
    beta = tl.load(beta_ptr + t * beta_stride + h).to(tl.float32)
    if L2NORM:
        q = unit(q, 0).to(q_ptr.dtype.element_ty).to(tl.float32)
        k = unit(k, 0).to(k_ptr.dtype.element_ty).to(tl.float32)
    if GATED:
        if dt_bias_ptr is not None:
            g += tl.load(dt_bias_ptr + h).to(tl.float32)
        g = A * softplus(g)
    if SIGMOID_BETA:
        beta = 1.0 / (1.0 + exp(-beta))
    return q, k, value, exp(g), beta


@triton.jit
def _step(state, q, k, value, decay, beta, scale):
    """The recurrence: the new columns and o."""
    state *= decay
    fresh = beta * (value - tl.sum(state * k[:, None], axis=0))
    state += k[:, None] * fresh[None, :]
    return state, tl.sum(state * q[:, None], axis=0) * scale


# Sizes that change from call to call must not key a compile: neither their divisibility nor their being 1; nor where
# an index array begins, which may be a slice of the batch's.
@triton.jit(
    do_not_specialize=["n_tokens", "n_sequences", "n_slots", "null_slot"],
    do_not_specialize_on_alignment=["source_ptr", "target_ptr", "cu_seqlens_ptr", "accepted_ptr"],
)
def fused_recurrent_gated_delta_rule_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, state_ptr, A_log_ptr, dt_bias_ptr, o_ptr,
    source_ptr, target_ptr, cu_seqlens_ptr, accepted_ptr,
    n_tokens, n_sequences, n_slots, null_slot,
    slot_stride, q_stride, k_stride, v_stride, g_stride, beta_stride, o_stride, scale,
    H_K: tl.constexpr, H_V: tl.constexpr, K: tl.constexpr, V: tl.constexpr, T_MAX: tl.constexpr, V_FIRST: tl.constexpr,
    L2NORM: tl.constexpr, SIGMOID_BETA: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, BLOCK_SIZE_V: tl.constexpr,
):  # fmt: skip
    """BLOCK_SIZE_K >= K."""
    BLOCKS: tl.constexpr = (V + BLOCK_SIZE_V - 1) // BLOCK_SIZE_V
    SPECULATIVE: tl.constexpr = accepted_ptr is not None
    GATED: tl.constexpr = A_log_ptr is not None

    # Offsets are 64-bit: a pool of 4100 slots of 32 heads of 128 x 128 has more than 2^31 elements.
    pid = tl.program_id(0)
    n = (pid // (BLOCKS * H_V)).to(tl.int64)
    h = ((pid // BLOCKS) % H_V).to(tl.int64)
    v = (pid % BLOCKS) * BLOCK_SIZE_V + tl.arange(0, BLOCK_SIZE_V)
    d = tl.arange(0, BLOCK_SIZE_K)
    in_K, in_V = d < K, v < V
    in_state = in_K[:, None] & in_V[None, :]
    if V_FIRST:
        element = h * (K * V) + (v[None, :] * K + d[:, None])
    else:
        element = h * (K * V) + (d[:, None] * V + v[None, :])
    row = h * V + v

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
            tl.store(o_ptr + t * o_stride + row, tl.zeros((BLOCK_SIZE_V,), o_ptr.dtype.element_ty), mask=in_V)
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
    A = 0.0
    if GATED:
        A = -exp(tl.load(A_log_ptr + h).to(tl.float32))

    if cu_seqlens_ptr is None:
        # One token: its operands are asked for before the state, which has to wait for the slot.
        q, k, value, decay, beta = _load_token(
            q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, dt_bias_ptr, A, n, q_stride, k_stride, v_stride, g_stride, beta_stride,
            h, d, v, in_K, in_V, H_K, H_V, K, V, GATED, L2NORM, SIGMOID_BETA)  # fmt: skip
        state = tl.load(state_ptr + slot * slot_stride + element, mask=in_state & live, other=0.0).to(tl.float32)
        state, o = _step(state, q, k, value, decay, beta, scale)
        if SPECULATIVE:
            target = tl.load((source_ptr if target_ptr is None else target_ptr) + n * T_MAX).to(tl.int64)
            live = live & (target < n_slots)
        o = tl.where(live, o, tl.where(padding, 0.0, float("nan")))
        tl.store(o_ptr + n * o_stride + row, o.to(o_ptr.dtype.element_ty), mask=in_V)
    else:
        state = tl.load(state_ptr + slot * slot_stride + element, mask=in_state & live & some, other=0.0).to(tl.float32)
        for t in range(begin, end):
            q, k, value, decay, beta = _load_token(
                q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, dt_bias_ptr, A, t,
                q_stride, k_stride, v_stride, g_stride, beta_stride,
                h, d, v, in_K, in_V, H_K, H_V, K, V, GATED, L2NORM, SIGMOID_BETA)  # fmt: skip
            state, o = _step(state, q, k, value, decay, beta, scale)
            good = live
            if SPECULATIVE:
                # Tokens past T_max have no slot: they are computed and their state is not kept.
                to = tl.load((source_ptr if target_ptr is None else target_ptr) + n * T_MAX + (t - begin),
                             mask=t - begin < T_MAX, other=-1).to(tl.int64)  # fmt: skip
                good = live & (to < n_slots)
                tl.store(state_ptr + to * slot_stride + element, state.to(state_ptr.dtype.element_ty),
                         mask=in_state & live & is_slot(to, null_slot, n_slots))  # fmt: skip
            o = tl.where(good, o, tl.where(padding, 0.0, float("nan")))
            tl.store(o_ptr + t * o_stride + row, o.to(o_ptr.dtype.element_ty), mask=in_V)
    if cu_seqlens_ptr is None or not SPECULATIVE:
        tl.store(state_ptr + target * slot_stride + element, state.to(state_ptr.dtype.element_ty),
                 mask=in_state & live & some & is_slot(target, null_slot, n_slots))  # fmt: skip
