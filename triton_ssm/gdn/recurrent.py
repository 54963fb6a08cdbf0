"""The gated delta rule token by token over a pool of states: decode.

    S = exp(g)·S          S = S + k ⊗ beta·(v - S^T·k)          o = scale·S^T·q

All arithmetic is fp32 after the loads, also beta's and the gate's where they are computed here. Rounding points: normalised q
and k, to their own dtype; o, to v's; the stored state, to the state's. o, and the next token of the same sequence, see the
fp32 state before that rounding.

Source: Yang, Kautz and Hatamizadeh, Gated Delta Networks (2024). Slots, packed sequences and speculative decode are those of
`selective_state_update`.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ssm_configs import lookup
from ssm_configs.contracts import gdn as contract

from .. import _arguments
from .._device import tuning_device_of
from .._plans import Cache, Launcher, call_key
from .._replay import replayed
from ._output import output_like
from ._plan import block
from ._recurrent_kernel import fused_recurrent_gated_delta_rule_kernel


@replayed
def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    sigmoid_beta: bool = False,
    use_qk_l2norm: bool = False,
    state_indices: torch.Tensor | None = None,
    dst_state_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    null_slot: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Updates `state` in place and returns o, of v's shape and dtype.

    Sizes: B tokens (T of them in N_seq sequences when packed), S slots, H_k query and key heads, H_v value heads, a multiple
    of H_k: value head h reads query and key head h // (H_v // H_k).
    Float tensors are float32, bfloat16 or float16; index tensors int32 or int64. Tokens may be any distance apart, so that q,
    k and v can be views of one projection.

    Args:
        q, k: [B,H_k,K]; K up to 256.
        v: [B,H_v,V]; q, k and v have one dtype.
        g: [B,H_v], the natural log of the decay, of either sign; with A_log the raw gate, from which the kernel computes it.
        beta: [B,H_v]; never rounded.
        state: [S,H_v,K,V], the pool. Slots may be any distance apart; within a slot it is dense, in this order or with V
            before K (the transposed view of a pool [S,H_v,V,K]).
        scale: K^-0.5 without it.
        A_log: [H_v]; the gate is then -exp(A_log)·softplus(g + dt_bias).
        dt_bias: [H_v]; only with A_log.
        sigmoid_beta: beta is sigmoid(beta).
        use_qk_l2norm: x·rsqrt(Σ x^2 + 1e-6) of every query and key first.
        state_indices: [B] (or [N_seq]), the slot each sequence starts from; slot n for sequence n without it. A slot < 0 is
            padding: its rows of o are zero and no state is read or written. Two sequences of one call must not write the
            same slot, nor one read what another writes: which comes first is not defined.
            With num_accepted_tokens: [N_seq,T_max], a slot for every token.
        dst_state_indices: the same shape; the slot to write, by default the one that was read. Padding here means that o is
            computed and the state dropped.
        cu_seqlens: [N_seq+1], the bounds of packed sequences; may repeat (a sequence of no tokens leaves its state alone).
            Rows of o at or past cu_seqlens[-1] are zero.
        num_accepted_tokens: [N_seq], speculative decode: sequence n starts from the state after its
            num_accepted_tokens[n]-th token of the last step, state_indices[n, num_accepted_tokens[n] - 1] with the column
            clamped to [0, T_max - 1], and the state after each token t < T_max is stored to its own slot
            dst_state_indices[n, t].
        null_slot: one more slot number that means padding (vLLM's block 0).
        out: where to put o.

    Raises:
        ValueError, TypeError: before anything is launched. A slot >= S can only be seen on the host for CPU tensors; on a
            GPU, where looking would cost a synchronisation, its rows of o are NaN and no state is touched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (
        q, k, v, g, beta, state, A_log, dt_bias, state_indices, dst_state_indices, cu_seqlens, num_accepted_tokens,
    )  # fmt: skip
    contract.check_flag("sigmoid_beta", sigmoid_beta)
    contract.check_flag("use_qk_l2norm", use_qk_l2norm)
    # with its type: 1 is as good a key as True, and only one of them is a bool
    key = call_key(tensors, type(null_slot), null_slot)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _make_plan(tensors, null_slot)
    dims = plan.dims
    scale = contract.check_scale(scale, dims.K)
    _arguments.check_slots_on_host("state_indices", state_indices, dims.S)
    _arguments.check_slots_on_host("dst_state_indices", dst_state_indices, dims.S)
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    o = output_like(v, out, dense=False)
    config = lookup("fused_recurrent_gated_delta_rule", **plan.request)
    if dims.T == 0:
        return o

    # Narrow states are not padded to what a product would need.
    BLOCK_SIZE_V = min(config["BLOCK_SIZE_V"], 1 << (dims.V - 1).bit_length())
    # One axis, because the others stop at 65,535; blocks run fastest, so that neighbours stream through one slot.
    # Without a sequence there is nobody to zero the padding rows, hence at least one.
    grid = (max(dims.N_seq, 1) * dims.H_v * -(-dims.V // BLOCK_SIZE_V), 1, 1)
    seen = [tensor.contiguous() if index in plan.copied else tensor for index, tensor in enumerate(tensors)]  # type: ignore[union-attr]
    _LAUNCH(
        key,
        grid,
        (
            *seen[:8], o, *seen[8:],
            dims.T, dims.N_seq, dims.S, -1 if null_slot is None else null_slot, *plan.strides, _arguments.row_stride(o), scale,
        ),
        (
            dims.H_k, dims.H_v, dims.K, dims.V, dims.T_max, plan.V_first, use_qk_l2norm, sigmoid_beta,
            block(contract.MAX_K, dims.K), BLOCK_SIZE_V,
        ),
        config["num_warps"],
    )  # fmt: skip
    return o


_LAUNCH = Launcher(fused_recurrent_gated_delta_rule_kernel)
_PLANS: Cache["_Plan"] = Cache()
_BY_ROW = ("q", "k", "v", "g", "beta")


@dataclass(frozen=True)
class _Plan:
    """All that follows from the shapes, strides and dtypes of a legal call, worked out once for all like it."""

    dims: contract.RecurrentDims
    request: dict[str, Any]
    """What the tuning table is asked for."""
    copied: tuple[int, ...]
    """Which tensors the kernel can read only as dense copies."""
    strides: tuple[int, ...]
    V_first: bool
    """Whether a slot lies as [H_v,V,K]."""


def _make_plan(tensors: tuple, null_slot: object) -> _Plan:
    """Raises where the call is not legal."""
    named: dict[str, Any] = dict(zip(contract.RECURRENT, tensors, strict=True))
    _arguments.check_tensors(named, "fused_recurrent_gated_delta_rule", 6)
    dims = _arguments.checked(contract.check_recurrent, named, null_slot=null_slot)
    copied = []
    for index, (name, tensor) in enumerate(named.items()):
        dense = _arguments.has_dense_rows if name in _BY_ROW else _arguments.is_dense
        if name != "state" and not dense(tensor):
            copied.append(index)
            named[name] = tensor.contiguous()
    state = named["state"]
    V_first = _lies_V_first(state, dims)
    slot = dims.H_v * dims.K * dims.V
    if dims.S > 1 and state.stride(0) < slot:
        raise ValueError(
            f"state: expected slots that do not overlap, {slot} or more elements apart, got {state.stride(0)}"
        )
    return _Plan(
        dims,
        {
            "twin": "triton",
            "device": tuning_device_of("q", state.device),
            "dtype": _arguments.dtype_name(state.dtype),
            "size": dims.N_seq * dims.H_v,
            "K": dims.K,
            "V": dims.V,
        },
        tuple(copied),
        (state.stride(0) if dims.S > 1 else slot, *(_arguments.row_stride(named[name]) for name in _BY_ROW)),
        V_first,
    )


def _lies_V_first(state: torch.Tensor, dims: contract.RecurrentDims) -> bool:
    """Whether a slot is dense as [H_v,V,K]; ValueError unless it is that or dense as it stands."""
    K, V = dims.K, dims.V
    for V_first, dense in ((False, (K * V, V, 1)), (True, (K * V, 1, K))):
        if all(
            size <= 1 or got == want for size, got, want in zip(state.shape[1:], state.stride()[1:], dense, strict=True)
        ):
            return V_first
    raise ValueError(
        f"state: expected strides (any, {K * V}, {V}, 1) or (any, {K * V}, 1, {K}), got {tuple(state.stride())}"
    )


def config_request(
    q, k, v, g, beta, state, *, scale=None, sigmoid_beta=False, use_qk_l2norm=False, null_slot=None, **optional
) -> dict[str, Any]:
    """What a call with these arguments asks the tuning table for."""
    contract.check_flag("sigmoid_beta", sigmoid_beta)
    contract.check_flag("use_qk_l2norm", use_qk_l2norm)
    named = dict.fromkeys(contract.RECURRENT[6:]) | optional
    tensors = (q, k, v, g, beta, state, *(named.pop(name) for name in contract.RECURRENT[6:]))
    if named:
        raise TypeError(f"explain: fused_recurrent_gated_delta_rule has no argument {', '.join(map(repr, named))}")
    plan = _make_plan(tensors, null_slot)
    contract.check_scale(scale, plan.dims.K)
    return plan.request
