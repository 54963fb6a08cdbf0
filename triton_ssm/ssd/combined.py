"""The chunked scan of a Mamba-2 layer, whole: prompts and training forward.

    S[t] = exp(dt[t]·A)·S[t-1] + dt[t]·x[t] ⊗ B[t]          y[t] = S[t]·C[t] + D·x[t], then · silu(z[t])

dt is clip(softplus(dt + dt_bias), dt_limit), bias and softplus where asked for, in fp32. All decays and sums are fp32. Four
products run on tensor cores in x's dtype, and what is rounded to it for them is: S before a chunk, for S·C;
C·B^T ∘ decay ∘ dt, for the chunk's own tokens; x·dt·decay, for the state that the chunk leaves. y is rounded once.

A fused kernel serves what it can, `triton_ssm.ssd`'s five stages one after another the rest; a tuning table has the last
word (`FUSED`), and `triton_ssm.explain` tells. On the five stages, states that are returned in fp32 resume a sequence bit for
bit where it was split at the end of a chunk.

Source: mamba_ssm's operator of this name; Dao and Gu, Transformers are SSMs (2024).
"""

import functools
import importlib
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from ssm_configs import Explanation, explain, lookup
from ssm_configs.config import Config
from ssm_configs.contracts import ssd as contract
from ssm_configs.search import Step

from .. import _arguments
from .._plans import Cache, call_key
from .._replay import replayed
from .._side_by_side import side_by_side
from . import _stages
from ._plan import Plan, dense_output, make_plan, state_dtype_name

_OP = "mamba_chunk_scan_combined"


@replayed
def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    state_dtype: torch.dtype = torch.float32,
    return_final_states: bool = False,
    return_intermediate_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    final_state_indices: torch.Tensor | None = None,
    chunk_aligned: bool = False,
    precision: str = "ieee",
    out: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """(y, final), or (y, final, intermediate): y [B,T,H,P] in x's dtype; final, the last states [N_seq,H,P,N], the pool that
    they were written to, or None; intermediate, the state after each of the caller's chunks [B,NC,H,P,N].

    Sizes: B batch rows, T tokens, H heads, G groups (H % G == 0), P headdim, N dstate, N_seq sequences (B of them unless
    packed), L chunk_size, NC chunks of a batch row: ceil(T / L). Packed, sequence n's chunk c is in slot
    cu_seqlens[n] // L + n + c of NC = T // L + N_seq, and slots in which no chunk stands are not written.
    Float tensors are float32, bfloat16 or float16, on their own but for x, B, C and z, which have one dtype; index tensors are
    int32 or int64.

    Args:
        x: [B,T,H,P], tokens any distance apart.
        dt: [B,T,H], likewise.
        A: [H]; negative.
        B, C: [B,T,G,N], as x.
        chunk_size: a power of two from 16 to 2048: where intermediate states are taken and aligned sequences begin. What the
            kernels work by is theirs.
        D: [H] or [H,P], the skip.
        z: [B,T,H,P], the gate; as x.
        dt_bias: [H].
        dt_softplus: softplus after the bias. It keeps the low bits of very negative steps.
        dt_limit: (low, high), 0 <= low <= high: the range that dt is clipped to at the end.
        initial_states: [N_seq,H,P,N].
        cu_seqlens: [N_seq+1], the bounds of packed sequences; then B = 1. They may repeat: a sequence without tokens ends in
            its initial state. Rows of y at or past cu_seqlens[-1] are zero.
        state_dtype: of the states that are returned; a pool keeps its own.
        return_final_states: whether to return the last states.
        return_intermediate_states: whether to return the state after each chunk.
        final_states_out: [S,H,P,N], a pool that the last states are written to, in place of a new tensor. Slots may be any
            distance apart; within a slot it must be dense.
        final_state_indices: [N_seq], the slot of each sequence; slot n for sequence n without it. A slot < 0 is padding: its
            state is dropped. Two sequences with one slot are the caller's error: whose state remains is not defined. So is
            an initial state in memory that a last state is written to, its own sequence's or another's: pieces of a
            sequence run side by side, and each may read it.
        chunk_aligned: x, B and C have rows in which every sequence begins at a multiple of L, as `causal_conv1d_split` writes
            them: [B, L·NC, …]. dt, z and y have T rows as ever.
        precision: "ieee" or "tf32", how fp32 inputs are multiplied.
        out: where to put y: a dense tensor of its shape and dtype, which shares no memory with x.

    Raises:
        ValueError, TypeError: before anything is launched. A slot >= S can only be seen on the host for CPU tensors; on a
            GPU its state is dropped.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (
        x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, final_states_out, final_state_indices,
    )  # fmt: skip
    dt_limit = _check_options(chunk_size, dt_softplus, dt_limit, state_dtype, return_final_states, return_intermediate_states,
                              chunk_aligned, precision)  # fmt: skip
    key = call_key(tensors, chunk_size, chunk_aligned)
    call = _CALLS.get(key)
    if call is None:
        call = _CALLS[key] = _Call(tensors, chunk_size, chunk_aligned)
    plan = call.plan
    dims = plan.dims
    _arguments.check_slots_on_host("final_state_indices", final_state_indices, dims.S)
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    # Aligned, x has more rows than y, or none where there is no sequence.
    y = dense_output(x, out, (dims.B, dims.T, dims.H, dims.P))
    final = final_states_out
    if final is None and return_final_states:
        final = torch.empty(dims.N_seq, dims.H, dims.P, dims.N, dtype=state_dtype, device=x.device)
    intermediate = None
    if return_intermediate_states:
        intermediate = torch.empty(dims.B, dims.NC, dims.H, dims.P, dims.N, dtype=state_dtype, device=x.device)

    x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, _, final_state_indices = plan.apply(tensors)
    config = lookup(_OP, **call.request)
    with side_by_side():
        if call.why_not_fused(config, return_intermediate_states) is None:
            _fused_path().run(
                plan, dims, config, x, dt, A, B, C,
                D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, initial_states=initial_states,
                cu_seqlens=cu_seqlens, y=y, final=final, final_indices=final_state_indices, intermediate=intermediate,
                chunk_aligned=chunk_aligned, precision=precision,
            )  # fmt: skip
        else:
            _stages.run(
                plan, call.stages, call.stage_configs(config),
                x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, y, final, final_state_indices, intermediate,
                dt_softplus=dt_softplus, dt_limit=dt_limit, chunk_aligned=chunk_aligned, precision=precision,
            )  # fmt: skip
    return (y, final) if intermediate is None else (y, final, intermediate)


class _Call:
    """All that follows from the shapes, strides, dtypes and options of a legal call."""

    def __init__(self, tensors: tuple, chunk_size: int, chunk_aligned: bool) -> None:
        self.plan = _plan(tensors, chunk_size, chunk_aligned)
        dims = self.plan.dims
        self.request = self.plan.request(dims.B * dims.T, nheads=dims.H, headdim=dims.P, dstate=dims.N)
        self.stages = _stages.make_stages(self.plan, _arguments.dtype_name(tensors[1].dtype))
        self._D_rank = 0 if tensors[5] is None else tensors[5].dim()
        self._unsupported: dict[bool, str | None] = {}
        self._stage_configs: tuple[Config | None, dict[str, Config]] = (None, {})

    def why_not_fused(self, config: Config, return_intermediate_states: bool) -> str | None:
        if not config["FUSED"]:
            return "FUSED=False"
        if return_intermediate_states not in self._unsupported:
            self._unsupported[return_intermediate_states] = _fused_path().unsupported(
                self.plan.dims, self.plan.dtype, self._D_rank, intermediate=return_intermediate_states
            )
        return self._unsupported[return_intermediate_states]

    def stage_configs(self, config: Config) -> dict[str, Config]:
        """Those of the stages. The look-up that gave `config` would have given another object, had an override, a table or
        the environment changed since."""
        seen, configs = self._stage_configs
        if seen is not config:
            configs = _stages.configs(self.stages)
            self._stage_configs = config, configs
        return configs


_CALLS: Cache[_Call] = Cache()


@functools.cache
def _fused_path() -> ModuleType:
    # Only where it is wanted: a stage needs none of it.
    return importlib.import_module(f"{__package__}._fused")


def _check_options(
    chunk_size: object, dt_softplus: object, dt_limit: object, state_dtype: object, return_final_states: object,
    return_intermediate_states: object, chunk_aligned: object, precision: object,
) -> tuple[float, float]:  # fmt: skip
    """dt_limit as a pair of floats."""
    contract.check_chunk_size(chunk_size)
    contract.check_flag("dt_softplus", dt_softplus)
    contract.check_flag("return_final_states", return_final_states)
    contract.check_flag("return_intermediate_states", return_intermediate_states)
    contract.check_flag("chunk_aligned", chunk_aligned)
    contract.check_precision(precision)
    contract.check_state_dtype(state_dtype_name(state_dtype))
    return contract.check_dt_limit(dt_limit)


def _plan(tensors: tuple, chunk_size: int, chunk_aligned: bool) -> Plan:
    plan = make_plan(
        _OP, contract.COMBINED, 5, tensors, contract.check_combined, tokens=("x", "dt", "B", "C", "z"),
        free=("final_states_out",), chunk_size=chunk_size, chunk_aligned=chunk_aligned,
    )  # fmt: skip
    pool = tensors[10]
    if pool is not None:
        _check_pool(pool, plan.dims)
    return plan


def _check_pool(pool: torch.Tensor, dims: contract.Dims) -> None:
    """It is written in place, so it cannot be copied; slots may be any distance apart."""
    dense = (dims.P * dims.N, dims.N, 1)
    sizes = pool.shape[1:]
    if any(size > 1 and got != want for size, got, want in zip(sizes, pool.stride()[1:], dense, strict=True)):
        raise ValueError(f"final_states_out: expected strides (any, {', '.join(map(str, dense))}), got {pool.stride()}")
    slot = dims.H * dims.P * dims.N
    if dims.S > 1 and pool.stride(0) < slot:
        raise ValueError(
            f"final_states_out: expected slots that do not overlap, {slot} or more elements apart, got {pool.stride(0)}"
        )


def explained(
    x, dt, A, B, C, *, chunk_size, dt_softplus=False, dt_limit=(0.0, float("inf")), state_dtype=torch.float32,
    return_final_states=False, return_intermediate_states=False, chunk_aligned=False, precision="ieee", **optional,
) -> Explanation:  # fmt: skip
    """The look-up of a call with these arguments, and the path that it would take."""
    named = dict.fromkeys(contract.COMBINED[5:]) | optional
    tensors = (x, dt, A, B, C, *(named.pop(name) for name in contract.COMBINED[5:]))
    if named:
        raise TypeError(f"explain: {_OP} has no argument {', '.join(map(repr, named))}")
    _check_options(chunk_size, dt_softplus, dt_limit, state_dtype, return_final_states, return_intermediate_states,
                   chunk_aligned, precision)  # fmt: skip
    call = _Call(tensors, chunk_size, chunk_aligned)
    answer = explain(_OP, **call.request)
    reason = call.why_not_fused(answer.config, return_intermediate_states)
    path = Step("path", "fused" if reason is None else f"the five stages: {reason}")
    return replace(answer, steps=(*answer.steps, path))
