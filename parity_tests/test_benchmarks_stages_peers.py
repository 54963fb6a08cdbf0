"""How the stages' peers are called: layouts, chunk bounds, gates and results, by stand-ins that compute with the oracle."""

import math
from typing import Any

import pytest
import torch

from benchmarks.implementations import PeerImplementation
from benchmarks.lab import Lab
from benchmarks.op import BenchOp, Storage
from benchmarks.ops import OPS

from .cases import Case
from .oracle import gdn, ssd
from .test_benchmarks_stages import ALL, CPU, GDN, NEW, NO_CLOCK, SSD, small


def numbers(*tensors: Any) -> Any:
    return [None if tensor is None else tensor.double().numpy() for tensor in tensors]


def tensors(made: Any, dtype: torch.dtype = torch.float32) -> Any:
    if isinstance(made, tuple):
        return tuple(tensors(one, dtype) for one in made)
    return torch.from_numpy(made).to(dtype)


# -- mamba_ssm: batch rows, as ours


def mamba_chunk_cumsum(dt, A, chunk_size, dt_bias, dt_softplus):
    dt, A, bias = numbers(dt, A, dt_bias)
    return tensors(ssd.chunk_cumsum(dt, A, chunk_size=chunk_size, dt_bias=bias, dt_softplus=dt_softplus))


def mamba_chunk_state(B, x, dt, dA_cumsum, states_in_fp32):
    assert states_in_fp32
    return tensors(ssd.chunk_state(*numbers(x, B, dt, dA_cumsum)))


def mamba_state_passing(states, dA_chunk_cumsum, initial_states):
    assert states.ndim == 4 and dA_chunk_cumsum.ndim == 3
    # The definition has an element of P and the rest of N, and reads the last of L.
    states, totals = numbers(states[..., None, :], dA_chunk_cumsum[..., None])
    initial = None if initial_states is None else initial_states[..., None, :].double().numpy()
    before, final = tensors(ssd.state_passing(states, totals, initial_states=initial))
    return before[..., 0, :], final[..., 0, :]


def mamba_bmm_chunk(a, b, chunk_size, output_dtype):
    return tensors(ssd.bmm_chunk(*numbers(a, b), chunk_size=chunk_size), output_dtype)


def mamba_chunk_scan(cb, x, dt, dA_cumsum, C, states, D):
    y = ssd.chunk_scan(*numbers(cb, x, dt, dA_cumsum, C, states), D=D.double().numpy())
    return tensors(y, x.dtype), None


# -- vLLM: no batch rows, and bounds


def check_bounds(bounds, tokens, chunk_size):
    assert bounds.dtype == torch.int32 and bounds.tolist() == [*range(0, tokens, chunk_size), tokens]


def vllm_chunk_cumsum(dt, A, chunk_size, cu_chunk_seqlens, dt_bias, dt_softplus):
    check_bounds(cu_chunk_seqlens, len(dt), chunk_size)
    return [made[0] for made in mamba_chunk_cumsum(dt[None], A, chunk_size, dt_bias, dt_softplus)]


def vllm_chunk_state(B, x, dt, dA_cumsum, cu_chunk_seqlens, states_in_fp32):
    check_bounds(cu_chunk_seqlens, len(x), dt.shape[-1])
    return mamba_chunk_state(B[None], x[None], dt[None], dA_cumsum[None], states_in_fp32)[0]


def vllm_state_passing(states, dA_cumsum, last_chunk_indices, initial_states, out_dtype):
    assert last_chunk_indices.tolist() == [len(states) - 1] and states.ndim == 3
    before, final = mamba_state_passing(states[None], dA_cumsum[None, ..., -1], initial_states)
    return torch.cat([before[0, 1:], final]).to(out_dtype)


def vllm_bmm_chunk(a, b, chunk_size, cu_chunk_seqlens, output_dtype):
    check_bounds(cu_chunk_seqlens, len(a), chunk_size)
    return mamba_bmm_chunk(a[None], b[None], chunk_size, output_dtype)[0]


def vllm_chunk_scan(cb, x, dt, dA_cumsum, C, states, cu_chunk_seqlens, out, seq_idx, D, initial_states):
    check_bounds(cu_chunk_seqlens, len(x), dt.shape[-1])
    assert seq_idx.tolist() == [0] * len(states)
    before = torch.cat([initial_states, states[:-1]])
    y, _ = mamba_chunk_scan(cb[None], x[None], dt[None], dA_cumsum[None], C[None], before[None], D)
    out.copy_(y[0])


# -- the gated delta rule: vLLM's gates are natural logarithms and its states [V,K]; FLA's gates are in powers of two


def cumsum(g, chunk_size):
    return tensors(gdn.chunk_local_cumsum(*numbers(g), chunk_size=chunk_size))


def kkt(k, g, beta, chunk_size):
    k, g, beta = numbers(k, g, beta)
    return tensors(gdn.chunk_scaled_dot_kkt(k, beta, g=g, chunk_size=chunk_size))


def solve(A):
    return tensors(gdn.solve_tril(*numbers(A)))


def vllm_w_u(k, v, beta, g_cumsum, A, cu_seqlens, chunk_indices):
    assert cu_seqlens is None and chunk_indices is None
    return tensors(gdn.recompute_w_u(*numbers(k, v, beta, A), g=g_cumsum.double().numpy()), k.dtype)


def fla_delta_h(k, w, u, g, initial_state, output_final_state, chunk_size):
    assert output_final_state
    g, initial = numbers(g * math.log(2), initial_state)
    made = gdn.chunk_delta_h(*numbers(k, w, u), g=g, initial_state=initial, chunk_size=chunk_size)
    h, v_new, final = tensors(made)
    return h.to(k.dtype), v_new.to(u.dtype), final


def vllm_delta_h(k, w, u, g, initial_state, output_final_state, chunk_size):
    initial = None if initial_state is None else initial_state.transpose(-1, -2)
    h, v_new, final = fla_delta_h(k, w, u, g / math.log(2), initial, output_final_state, chunk_size)
    return h.transpose(-1, -2).contiguous(), v_new, final.transpose(-1, -2).contiguous()


STAND_INS = {
    "ssd_chunk_cumsum": {"vllm": vllm_chunk_cumsum, "mamba_ssm": mamba_chunk_cumsum},
    "ssd_chunk_state": {"vllm": vllm_chunk_state, "mamba_ssm": mamba_chunk_state},
    "ssd_state_passing": {"vllm": vllm_state_passing, "mamba_ssm": mamba_state_passing},
    "ssd_bmm_chunk": {"vllm": vllm_bmm_chunk, "mamba_ssm": mamba_bmm_chunk},
    "ssd_chunk_scan": {"vllm": vllm_chunk_scan, "mamba_ssm": mamba_chunk_scan},
    "gdn_chunk_local_cumsum": {"vllm": cumsum, "fla": cumsum},
    "gdn_chunk_scaled_dot_kkt": {
        "vllm": kkt, "fla": lambda k, g, beta, chunk_size: kkt(k, g * math.log(2), beta, chunk_size),
    },
    "gdn_solve_tril": {"vllm": solve, "fla": solve},
    "gdn_recompute_w_u": {
        "vllm": vllm_w_u, "fla": lambda g, **named: vllm_w_u(g_cumsum=g * math.log(2), **named),
    },
    "gdn_chunk_delta_h": {"vllm": vllm_delta_h, "fla": fla_delta_h},
}  # fmt: skip


def dense(op: BenchOp, initial: bool) -> Case:
    ours = op.name.startswith("ssd_")
    options = {"initial": initial} | ({"D": True} if ours else {})
    return Case(op.operator, "dense", SSD if ours else GDN, op.run_dtypes[0], options=options)


@ALL
@pytest.mark.parametrize("initial", [False, True])
def test_peers_are_called_the_way_they_want_it(op, initial):
    assert {peer.name for peer in op.peers} == STAND_INS[op.name].keys()
    case = dense(op, initial)
    for peer in op.peers:
        assert peer.takes(case) and not peer.takes(small(op, packed=True))
        lab = Lab(op, PeerImplementation(CPU, peer, STAND_INS[op.name][peer.name]), NO_CLOCK, Storage(CPU))
        for _ in range(2):
            wrong, errors = lab.check(case, None)
            assert wrong is None, peer.name
            # vLLM has the states after chunks, not before.
            after = op.name == "ssd_state_passing" and peer.name == "vllm"
            assert set(errors) == ({"final"} if after else {op.result, *op.fresh})


def test_peers_without_batch_rows_take_one_sequence():
    two = {op.name: [peer.name for peer in op.peers if peer.takes(small(op, packed=False))] for op in NEW}
    assert two == {
        name: ["mamba_ssm"] if name.startswith("ssd_") else ["vllm", "fla"] for name in OPS if name in STAND_INS
    }
