"""The gated delta rule over whole sequences: prompts and training forward.

    S[t] = exp(g[t])·S[t-1] + k[t] ⊗ beta[t]·(v[t] - (exp(g[t])·S[t-1])^T·k[t])          o[t] = scale·S[t]^T·q[t]

Two paths, of which the tuning table chooses one. Stage by stage, as `triton_ssm.gdn` has them: states and v_new are written for
all chunks, and the outputs of all chunks are computed at once. Rounded: q and k, where they are normalised, to their own dtype;
the inverse, w, u, v_new and the state before each chunk to k's dtype; o once, to v's.

Fused, for Hopper: one kernel does all that needs no state, for all chunks at once (`_prepare_kernel`), and one carries the
states through the chunks and computes the outputs on the way (`_loop_kernel`). With A the matrix of `chunk_scaled_dot_kkt`, P
that of `chunk_o`'s products within a chunk, h the state before it, G the gate cumulated within it, and fq and fk the factors
that make norms of q and k one:

    X   = (I + A)^-1·diag(beta)    PX = P·X    Y = (diag(d)·X)^T·k, d_i = fk_i·exp(G_last - G_i)
    r_i = v_i - fk_i·exp(G_i)·h^T k_i
    o_i = scale·fq_i·exp(G_i)·h^T q_i + Σ_j PX_ij·r_j          h <- exp(G_last)·h + Y^T·r

Rounded, to q's dtype: P; X and diag(d)·X; PX and Y; h and r; o once. Factors and sums are fp32. They take 16-bit inputs, chunks
of 64, and K and V of 64 or 128; other calls go stage by stage whatever the table says, and all of them do in the interpreter.
Without cu_seqlens, long sequences of few heads are cut into segments of chunks that run at once: what one does to a state is
linear, and a pass without outputs finds the states between them, in fp32 (`_segments`). Rounding points are the same.

Source: Yang, Kautz and Hatamizadeh, Gated Delta Networks (2024); flash-linear-attention's operator of this name.
"""

from typing import Any

import torch

from ssm_configs import lookup
from ssm_configs.config import Config
from ssm_configs.contracts import gdn as contract

from .. import _arguments
from .._plans import Cache, Launcher, call_key
from .._replay import replayed
from .._side_by_side import side_by_side
from . import _loop, _prepare
from ._kkt_solve_kernel import kkt_solve_kernel
from ._l2norm_kernel import l2norm_kernel
from ._output import output_like
from ._plan import Plan, block, make_plan
from .chunk_delta_h import launch as launch_chunk_delta_h
from .chunk_delta_h import request as chunk_delta_h_request
from .chunk_o import launch as launch_chunk_o
from .chunk_o import request as chunk_o_request
from .recompute_w_u import launch as launch_recompute_w_u
from .recompute_w_u import request as recompute_w_u_request


@replayed
def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm: bool = False,
    chunk_size: int = 64,
    return_final_state: bool = False,
    precision: str = "ieee",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(o [B,T,H_v,V] in v's dtype, the last states [N_seq,H_v,K,V] in fp32 or None).

    Sizes: B batch rows, T tokens, N_seq sequences (B of them unless packed), H_k query and key heads, H_v value heads, a
    multiple of H_k: value head h reads query and key head h // (H_v // H_k).
    Float tensors are float32, bfloat16 or float16. Tokens may be any distance apart, so that q, k and v can be views of one
    projection.

    Args:
        q, k: [B,T,H_k,K]; K up to 256.
        v: [B,T,H_v,V]; q, k and v have one dtype.
        g: [B,T,H_v], the natural log of the decay, of any float dtype and either sign.
        beta: [B,T,H_v], of any float dtype, and never rounded.
        scale: K^-0.5 without it.
        initial_state: [N_seq,H_v,K,V], of any float dtype; zeros without it.
        cu_seqlens: [N_seq+1], int32 or int64, the bounds of packed sequences; then B = 1. They may repeat (a sequence
            without tokens hands its state on), and rows of o at or past cu_seqlens[-1] are zero.
        use_qk_l2norm: x·rsqrt(Σ x^2 + 1e-6) of every query and key first.
        chunk_size: 16, 32 or 64.
        return_final_state: whether the last states are wanted.
        precision: "ieee" or "tf32", how fp32 inputs are multiplied; the inverse is always "ieee".
        out: where to put o: a dense tensor of its shape and dtype, which may share memory with none of the inputs.

    Raises:
        ValueError, TypeError: before anything is launched.
        RuntimeError: an argument asks for a gradient; there is no backward here.
    """
    tensors = (q, k, v, g, beta, initial_state, cu_seqlens)
    contract.check_precision(precision)
    contract.check_flag("use_qk_l2norm", use_qk_l2norm)
    contract.check_flag("return_final_state", return_final_state)
    key = call_key(tensors, type(chunk_size), chunk_size)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(tensors, chunk_size)
    dims: Any = plan.dims
    scale = contract.check_scale(scale, dims.K)
    _arguments.check_bounds_on_host(cu_seqlens, dims.T)
    o = output_like(v, out)
    final = None
    if return_final_state:
        final = torch.empty(dims.N_seq, dims.H_v, dims.K, dims.V, dtype=torch.float32, device=q.device)
    if o.numel() or (final is not None and final.numel()):
        config = lookup("chunk_gated_delta_rule", **_request(plan))
        tensors = plan.apply(tensors)
        with side_by_side():
            _run(plan, dims, config, use_qk_l2norm, scale, precision, tensors, o, final)
    return o, final


_PLANS: Cache[Plan] = Cache()
_CONFIGS: Cache[tuple[Config, dict[str, Config]]] = Cache()
_L2NORM = Launcher(l2norm_kernel)
_KKT_SOLVE = Launcher(kkt_solve_kernel)
_TOKENS_PER_PROGRAM = 16


def _run(
    plan: Plan, dims: contract.Dims, config: Config, use_qk_l2norm: bool, scale: float, precision: str, tensors: Any, o, final
) -> None:  # fmt: skip
    fused = bool(config["FUSED"]) and _loop.serves(dims, o)
    # Launches are remembered by what tells all their tensors apart.
    key = (plan, use_qk_l2norm, fused, final is None)
    if fused:
        _run_fused(key, dims, config, plan.strides, use_qk_l2norm, scale, tensors, o, final)
        return
    q, k, v, g, beta, initial_state, cu_seqlens = tensors
    stage = _stage_configs(plan, dims, config)
    strides = plan.strides
    if use_qk_l2norm:
        q, k, strides = _normalised(key, dims, q, k, strides)

    def per_token(*last: int, dtype: torch.dtype = k.dtype) -> torch.Tensor:
        return torch.empty(dims.B, dims.T, dims.H_v, *last, dtype=dtype, device=k.device)

    sums, inverse = per_token(dtype=torch.float32), per_token(dims.L)
    w, u = per_token(dims.K), per_token(dims.V)
    if o.numel():
        _solve(key, dims, config, strides, precision, k, g, beta, sums, inverse, cu_seqlens)
        w_u = stage["gdn_recompute_w_u"]
        launch_recompute_w_u(key, dims, w_u, strides, False, precision, k, v, beta, inverse, sums, cu_seqlens, w, u)
    h = torch.empty(dims.B, dims.NC, dims.H_v, dims.K, dims.V, dtype=k.dtype, device=k.device)
    v_new = per_token(dims.V)
    launch_chunk_delta_h(
        key, dims, stage["gdn_chunk_delta_h"], strides["k"], precision,
        k, w, u, sums, initial_state, h, v_new, final, cu_seqlens,
    )  # fmt: skip
    if o.numel():
        strides = strides | {"v": (dims.T * dims.H_v * dims.V, dims.H_v * dims.V)}
        forms = (False, False, precision)
        launch_chunk_o(key, dims, stage["gdn_chunk_o"], strides, forms, scale, q, k, v_new, h, sums, cu_seqlens, o)


def _run_fused(key, dims: contract.Dims, config: Config, strides, use_qk_l2norm: bool, scale: float, tensors, o, final):
    """Between the two kernels a chunk is a tile of PX and one of Y for each head, in the order of the chunks' slots; slots that
    are no chunk hold nothing."""
    q, k, v, g, beta, initial_state, cu_seqlens = tensors
    # Once, for both.
    (q, q_stride), (k, k_stride), (v, v_stride) = [
        _prepare.readable(x, *strides[name]) for name, x in (("q", q), ("k", k), ("v", v))
    ]
    heads = dims.B * dims.NC * dims.H_v
    PX, Y = (torch.empty(heads * dims.L, width, dtype=q.dtype, device=q.device) for width in (dims.L, dims.K))
    gates = torch.empty(heads * _loop.GATE_ROWS, 2 * dims.L, dtype=torch.float32, device=q.device)
    _prepare.launch(
        key, dims, config, strides, use_qk_l2norm, scale, q, k, g, beta, cu_seqlens, q_stride, k_stride, PX, Y, gates
    )
    _loop.launch(
        key, dims, config, q, k, v, q_stride, k_stride, v_stride, PX, Y, gates, initial_state, final, cu_seqlens, o
    )


def _stage_configs(plan: Plan, dims: contract.Dims, config: Config) -> dict[str, Config]:
    """Those of the stages. The look-up that gave `config` would have given another object, had an override, a table or the
    environment changed since."""
    seen = _CONFIGS.get(plan)
    if seen is None or seen[0] is not config:
        found = {
            "gdn_recompute_w_u": lookup("gdn_recompute_w_u", **recompute_w_u_request(plan, dims)),
            "gdn_chunk_delta_h": lookup("gdn_chunk_delta_h", **chunk_delta_h_request(plan, dims)),
            "gdn_chunk_o": lookup("gdn_chunk_o", **chunk_o_request(plan, dims)),
        }
        seen = _CONFIGS[plan] = (config, found)
    return seen[1]


def _normalised(key, dims: contract.Dims, q, k, strides):
    """q and k, dense, and how all tensors lie then."""
    out = [torch.empty(dims.B, dims.T, dims.H_k, dims.K, dtype=x.dtype, device=x.device) for x in (q, k)]
    (q_batch, q_token), (k_batch, k_token) = strides["q"], strides["k"]
    grid = (2 * dims.H_k * dims.B * -(-dims.T // _TOKENS_PER_PROGRAM), 1, 1)
    if grid[0]:
        arguments = (q, k, *out, dims.T, q_batch, k_batch, q_token, k_token)
        _L2NORM(key, grid, arguments, (dims.H_k, dims.K, _TOKENS_PER_PROGRAM, block(contract.MAX_K, dims.K)), 4)
    dense = (dims.T * dims.H_k * dims.K, dims.H_k * dims.K)
    return *out, strides | {"q": dense, "k": dense}


def _solve(key, dims: contract.Dims, config: Config, strides, precision: str, k, g, beta, sums, inverse, cu_seqlens):
    batch, token = zip(*(strides[name] for name in ("k", "g", "beta")), strict=True)
    grid = (max(dims.B * dims.NC, 1) * dims.H_v, 1, 1)
    BLOCK_SIZE_K = block(_KKT_BLOCK_FP32 if k.dtype == torch.float32 else contract.MAX_K, dims.K)
    _KKT_SOLVE(
        key,
        grid,
        (k, g, beta, sums, inverse, cu_seqlens, dims.T, dims.NC, dims.N_seq, *batch, *token),
        (dims.H_k, dims.H_v, dims.K, dims.L, precision, BLOCK_SIZE_K),
        config["kkt_num_warps"],
    )


# Products of fp32 hold whole blocks of both operands in registers.
_KKT_BLOCK_FP32 = 16


def _plan(tensors, chunk_size: int) -> Plan:
    return make_plan(
        "chunk_gated_delta_rule", contract.COMBINED, 5, tensors, contract.check_combined,
        tokens=("q", "k", "v", "g", "beta"), chunk_size=chunk_size,
    )  # fmt: skip


def _request(plan: Plan) -> dict[str, Any]:
    dims: Any = plan.dims
    return plan.request(dims.N_seq * dims.H_v, K=dims.K, V=dims.V, chunk_size=dims.L)


def config_request(
    q, k, v, g, beta, *, scale=None, initial_state=None, cu_seqlens=None, use_qk_l2norm=False, chunk_size=64,
    return_final_state=False, precision="ieee",
) -> dict[str, Any]:  # fmt: skip
    """What a call with these arguments asks the tuning table for."""
    contract.check_precision(precision)
    contract.check_flag("use_qk_l2norm", use_qk_l2norm)
    contract.check_flag("return_final_state", return_final_state)
    plan = _plan((q, k, v, g, beta, initial_state, cu_seqlens), chunk_size)
    contract.check_scale(scale, plan.dims.K)
    return _request(plan)
