"""One decode step of Mamba-2's recurrence over a pool of states.

    dt'   = softplus(dt + dt_bias)                  (each part where it is asked for)
    state = state · exp(A · dt') + (dt' · x) ⊗ B
    y     = (Σ_N state · C + D · x) · z · sigmoid(z)  (each part where it is given)

All arithmetic is fp32 after the loads. Rounding points: y to x's dtype; the stored state to the state's dtype. y, and the
next token of the same sequence, see the fp32 state before that rounding.

Source: Dao and Gu, "Transformers are SSMs", 2024 (arXiv 2405.21060). Slots, packed sequences and speculative decode follow
vLLM's operator of this name, except that padding rows give zeros and every index is bounded before it is used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ssm_configs import lookup
from ssm_configs.contracts import selective_state_update as contract

from . import _arguments
from ._device import tuning_device_of
from ._plans import Cache, Launcher, call_key
from ._replay import replayed
from ._selective_state_update_kernel import selective_state_update_kernel


@replayed
def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
    dst_state_batch_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    null_slot: int | None = None,
    rounding_seed: int | torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Updates `state` in place and returns y, of x's shape and dtype.

    Sizes: B tokens (T of them in N_seq sequences when packed), S slots, H heads, G groups (H % G == 0), P headdim, N dstate.
    Float tensors are float32, bfloat16 or float16, each on its own; index tensors are int32 or int64.

    Args:
        state: [S,H,P,N], the pool. Slots may be any distance apart; within a slot it must be dense.
            A head-less call leaves the H axis out of every argument and the G axis out of B and C: state [S,P,N].
        x: [B,H,P].
        dt: [B,H], or [B,H,P] when every row of headdim has a step of its own. An expanded view is taken as [B,H].
        A: [H], or [H,P,N]; negative. Expanded views likewise.
        B, C: [B,G,N].
        D: [H] or [H,P], the skip.
        z: [B,H,P], the gate.
        dt_bias: [H] or [H,P].
        dt_softplus: softplus after the bias. It keeps the low bits of very negative steps.
        state_batch_indices: [B] (or [N_seq]), the slot each sequence starts from; slot n for sequence n without it. A slot
            < 0 is padding: its rows of y are zero and no state is read or written. Two sequences of one call must not
            write the same slot, nor one read what another writes: which comes first is not defined.
            With num_accepted_tokens: [N_seq,T_max], a slot for every token.
        dst_state_batch_indices: the same shape; the slot to write, by default the one that was read. Padding here means
            that y is computed and the state dropped.
        cu_seqlens: [N_seq+1], the bounds of packed sequences; may repeat (a sequence of no tokens leaves its state alone).
            Rows of y at or past cu_seqlens[-1] are zero.
        num_accepted_tokens: [N_seq], speculative decode: sequence n starts from the state after its
            num_accepted_tokens[n]-th token of the last step, state_batch_indices[n, num_accepted_tokens[n] - 1] with the
            column clamped to [0, T_max - 1], and the state after each token t < T_max is stored to its own slot
            dst_state_batch_indices[n, t].
        null_slot: one more slot number that means padding (vLLM's block 0).
        rounding_seed: store a 16-bit state with stochastic rounding: Philox-4x32-10 keyed by the seed, counted by the
            element's place in the pool, so the same seed gives the same bits whatever the launch, and the bits of
            `pallas_ssm`. A one-element integer tensor on the device can change between replays of a CUDA graph.
        out: where to put y.

    Raises:
        ValueError, TypeError: before anything is launched. A slot >= S can only be seen on the host for CPU tensors; on a
            GPU, where looking would cost a synchronisation, its rows of y are NaN and no state is touched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (
        state, x, dt, A, B, C, D, z, dt_bias,
        state_batch_indices, dst_state_batch_indices, cu_seqlens, num_accepted_tokens,
    )  # fmt: skip
    # with their types: 1 is as good a key as True, and only one of them is a bool
    key = call_key(tensors, type(dt_softplus), dt_softplus, type(null_slot), null_slot, rounding_seed is None)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _make_plan(tensors, dt_softplus, null_slot, rounding_seed is not None)
    dims = plan.dims
    _arguments.check_slots_on_host("state_batch_indices", state_batch_indices, dims.S)
    _arguments.check_slots_on_host("dst_state_batch_indices", dst_state_batch_indices, dims.S)
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    y = _arguments.output_like(x, out)
    seed = _arguments.seed_tensor(rounding_seed, state.device)
    config = lookup("selective_state_update", **plan.request)
    if dims.T == 0:
        return y

    BLOCK_SIZE_M = config["BLOCK_SIZE_M"]
    # One axis, because the others stop at 65,535; row blocks run fastest, so that neighbours stream through one slot.
    # Without a sequence there is nobody to zero the padding rows, hence at least one.
    grid = (max(dims.N_seq, 1) * dims.H * -(-dims.P // BLOCK_SIZE_M), 1, 1)
    arguments = plan.apply(tensors)
    _LAUNCH(
        key,
        grid,
        (
            *arguments[:9], y, *arguments[9:], seed,
            dims.T, dims.N_seq, dims.S, -1 if null_slot is None else null_slot, *plan.strides, _arguments.row_stride(y),
        ),
        (*plan.constants, BLOCK_SIZE_M),
        config["num_warps"],
    )  # fmt: skip
    return y


_LAUNCH = Launcher(selective_state_update_kernel)
_PLANS: Cache["_Plan"] = Cache()


@dataclass(frozen=True)
class _Plan:
    """All that follows from the shapes, strides, dtypes and options of a legal call, worked out once for all like it."""

    dims: contract.Dims
    request: dict[str, Any]
    """What the tuning table is asked for."""
    views: tuple[tuple[int, Callable[[torch.Tensor], torch.Tensor]], ...]
    """Which tensors reach the kernel in another form, and how."""
    strides: tuple[int, ...]
    constants: tuple[int | bool, ...]

    def apply(self, tensors: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        if not self.views:
            return tensors
        seen = list(tensors)
        for index, view in self.views:
            seen[index] = view(seen[index])  # type: ignore[arg-type]
        return seen


def _make_plan(tensors: tuple, dt_softplus: bool, null_slot: int | None, stochastic_rounding: bool) -> _Plan:
    """Raises where the call is not legal."""
    named: dict[str, Any] = dict(zip((*contract.REQUIRED, *contract.OPTIONAL), tensors, strict=True))
    _arguments.check_tensors(named, "selective_state_update", len(contract.REQUIRED))
    if type(dt_softplus) is not bool:
        raise TypeError(f"dt_softplus: expected a bool, got {type(dt_softplus).__name__}")
    # The operators of mamba_ssm and vLLM take per-head numbers as expanded views; here they are what they are.
    heads = tensors[0].dim() - 3
    views: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    for name, rank, axes in (("dt", heads + 2, 1), ("A", heads + 2, 2), ("D", heads + 1, 1), ("dt_bias", heads + 1, 1)):
        if _arguments.is_expanded(named[name], rank, axes):
            views[name] = _arguments.collapse(axes)
            named[name] = views[name](named[name])
    dims = _arguments.checked(contract.check, named, null_slot=null_slot, stochastic_rounding=stochastic_rounding)
    for name, tensor in named.items():
        by_row = name in ("x", "dt", "B", "C", "z")
        if name != "state" and not (_arguments.has_dense_rows(tensor) if by_row else _arguments.is_dense(tensor)):
            views[name] = _arguments.then_dense(views.get(name))
            named[name] = tensor.contiguous()
    order = list(named)
    return _Plan(
        dims,
        {
            "twin": "triton",
            "device": tuning_device_of("state", tensors[0].device),
            "dtype": _arguments.dtype_name(tensors[0].dtype),
            "size": dims.N_seq * dims.H,
            "headdim": dims.P,
            "dstate": dims.N,
        },
        tuple((order.index(name), view) for name, view in views.items()),
        (_slot_stride(tensors[0], dims), *(_arguments.row_stride(named[name]) for name in ("x", "dt", "B", "C", "z"))),
        (
            dims.H, dims.G, dims.P, dims.N, dims.T_max, dims.tied_dt, dims.tied_dt_bias, dims.tied_A, dims.tied_D,
            dt_softplus, max(8, next_power_of_2(dims.N)),
        ),
    )  # fmt: skip


def next_power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def config_request(
    state, x, dt, A, B, C, *, dt_softplus=False, null_slot=None, rounding_seed=None, **optional
) -> dict[str, Any]:  # fmt: skip
    """What a call with these arguments asks the tuning table for."""
    named = dict.fromkeys(contract.OPTIONAL) | optional
    tensors = (state, x, dt, A, B, C, *(named.pop(name) for name in contract.OPTIONAL))
    if named:
        raise TypeError(f"explain: selective_state_update has no argument {', '.join(map(repr, named))}")
    return _make_plan(tensors, dt_softplus, null_slot, rounding_seed is not None).request


def _slot_stride(state: torch.Tensor, dims: contract.Dims) -> int:
    """Elements from one slot to the next; within a slot the state must be dense, for it cannot be copied and stay it."""
    dense = (dims.P * dims.N, dims.N, 1)[-(state.dim() - 1) :]
    if any(
        size > 1 and got != want for size, got, want in zip(state.shape[1:], state.stride()[1:], dense, strict=True)
    ):
        raise ValueError(f"state: expected strides (any, {', '.join(map(str, dense))}), got {state.stride()}")
    slot = dims.H * dims.P * dims.N
    if dims.S > 1 and state.stride(0) < slot:
        raise ValueError(
            f"state: expected slots that do not overlap, {slot} or more elements apart, got {state.stride(0)}"
        )
    return state.stride(0) if dims.S > 1 else slot
