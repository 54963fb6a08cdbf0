"""The third stage of the chunked SSD scan: the recurrence over chunks.

    S[c + 1] = exp(dA_cumsum[c, last])·S[c] + states[c]          S[0] = the initial state, or zeros

S is carried in fp32; what is returned is rounded to state_dtype.

Source: mamba_ssm's operators of these names; Dao and Gu, Transformers are SSMs (2024).
"""

from dataclasses import replace
from typing import Any

import torch

from ssm_configs import lookup
from ssm_configs.config import Config
from ssm_configs.contracts import ssd as contract

from .. import _arguments
from .._plans import Cache, Launcher, call_key
from .._replay import replayed
from ._plan import Plan, make_plan, state_dtype_name
from ._state_passing_kernel import state_passing_kernel


@replayed
def state_passing(
    states: torch.Tensor,
    dA_cumsum: torch.Tensor,
    *,
    initial_states: torch.Tensor | None = None,
    state_dtype: torch.dtype = torch.float32,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the state before each chunk [B,NC,H,P,N], the last state of each sequence [N_seq,H,P,N]), in state_dtype.

    Sizes: as in `chunk_state`. Slots in which no chunk stands are not written.

    Args:
        states: [B,NC,H,P,N] in fp32, of `chunk_state`.
        dA_cumsum: [B,H,NC,L] in fp32, of `chunk_cumsum`; only its last entries are read.
        initial_states: [N_seq,H,P,N]; float32, bfloat16 or float16.
        state_dtype: float32, bfloat16 or float16.
        cu_seqlens: [N_seq+1], the bounds of packed sequences; then B = 1. They may repeat: a sequence without tokens ends
            in its initial state.

    Raises:
        ValueError, TypeError: before anything is launched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (states, dA_cumsum, initial_states, cu_seqlens)
    contract.check_state_dtype(state_dtype_name(state_dtype))
    key = call_key(tensors)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(tensors)
    dims = plan.dims
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    before = torch.empty(states.shape, dtype=state_dtype, device=states.device)
    final = torch.empty(dims.N_seq, dims.H, dims.P, dims.N, dtype=state_dtype, device=states.device)
    if final.numel():
        config = lookup("ssd_state_passing", **_request(plan))
        states, dA_cumsum, initial_states, cu_seqlens = plan.apply(tensors)
        launch(plan, dims, config, 1, states, dA_cumsum, initial_states, before, None, final, None, cu_seqlens)
    return before, final


_LAUNCH = Launcher(state_passing_kernel)
_PLANS: Cache[Plan] = Cache()


def launch(
    key, dims: contract.Dims, config: Config, chunks_per_export: int,
    states, dA_cumsum, initial_states, before, after, final, final_slots, cu_seqlens,
) -> None:  # fmt: skip
    """`before` may be `states`; `after`: the states after every so many chunks; `final`: [N_seq,…], or a pool."""
    size = dims.P * dims.N
    BLOCK_SIZE = min(config["BLOCK_SIZE"], 1 << (size - 1).bit_length())
    slots, stride = (0, 0) if final is None else (final.shape[0], final.stride(0))
    # Which of these there are, and their dtypes, follow from options that no key of the inputs has.
    key = (key, *(None if tensor is None else tensor.dtype for tensor in (before, after, final)))
    grid = (dims.N_seq * dims.H * -(-size // BLOCK_SIZE), 1, 1)
    _LAUNCH(
        key,
        grid,
        (
            states, dA_cumsum, initial_states, before, after, final, final_slots, cu_seqlens,
            dims.T, dims.NC, slots, stride if slots > 1 else dims.H * size,
        ),
        (dims.H, size, dims.L, chunks_per_export, BLOCK_SIZE, config["num_stages"]),
        config["num_warps"],
    )  # fmt: skip


def _plan(tensors) -> Plan:
    return make_plan("ssd.state_passing", contract.STATE_PASSING, 2, tensors, _check)


def _check(*arguments: Any) -> contract.Dims:
    dims = contract.check_state_passing(*arguments)
    if dims.packed and dims.NC < dims.N_seq:
        raise ValueError(f"states: expected a chunk slot for each of {dims.N_seq} sequences, got NC={dims.NC}")
    # The most tokens that these slots can be for.
    T = (dims.NC - dims.N_seq) * dims.L + dims.L - 1 if dims.packed else dims.NC * dims.L
    return replace(dims, T=T)


def _request(plan: Plan) -> dict[str, Any]:
    dims = plan.dims
    return plan.request(dims.N_seq * dims.H, headdim=dims.P, dstate=dims.N)


def config_request(
    states, dA_cumsum, *, initial_states=None, state_dtype=torch.float32, cu_seqlens=None
) -> dict[str, Any]:
    """What a call with these arguments asks the tuning table for."""
    contract.check_state_dtype(state_dtype_name(state_dtype))
    return _request(_plan((states, dA_cumsum, initial_states, cu_seqlens)))
