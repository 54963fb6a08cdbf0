"""How the gated delta rule's peers are called: layouts, metadata and results, by stand-ins that compute with the oracle."""

import math

import numpy as np
import pytest
import torch

from benchmarks import peers
from benchmarks.implementations import PeerImplementation
from benchmarks.lab import Lab
from benchmarks.op import Storage
from benchmarks.ops import OPS

from .oracle import gdn as oracle
from .test_benchmarks_gdn import CASES, CHUNK_O, CHUNKED, CPU, DECODE, EACH, NO_CLOCK, op_of


def numbers(tensor):
    return None if tensor is None else tensor.double().numpy()


def to(result, like, dtype=None):
    return torch.from_numpy(np.asarray(result)).to(dtype or like.dtype)


def check_chunks(cu_seqlens, chunk_indices):
    """Both libraries' table: each chunk's sequence and place."""
    assert (cu_seqlens is None) == (chunk_indices is None)
    if cu_seqlens is not None:
        places = [(n, c) for n, length in enumerate(cu_seqlens.diff().tolist()) for c in range(-(-length // 64))]
        assert [tuple(row) for row in chunk_indices.tolist()] == places and cu_seqlens.dtype == torch.int64


def chunked(q, k, v, g, beta, initial_state, cu_seqlens, use_qk_l2norm):
    ends = None if cu_seqlens is None else cu_seqlens.numpy()
    o, final = oracle.chunk_gated_delta_rule(
        *map(numbers, (q, k, v, g, beta)),
        initial_state=numbers(initial_state),
        cu_seqlens=ends,
        use_qk_l2norm=use_qk_l2norm,
    )
    return to(o, v), to(final, v, torch.float32)


def fla(
    q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens=None, chunk_indices=None
):
    assert output_final_state
    check_chunks(cu_seqlens, chunk_indices)
    return chunked(q, k, v, g, beta, initial_state, cu_seqlens, use_qk_l2norm_in_kernel)


def flash_qla(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens=None):
    assert output_final_state
    return chunked(q, k, v, g, beta, initial_state, cu_seqlens, use_qk_l2norm_in_kernel)


def vllm(
    q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens=None, chunk_indices=None,
    chunk_offsets=None,
):  # fmt: skip
    assert output_final_state
    check_chunks(cu_seqlens, chunk_indices)
    if cu_seqlens is not None:
        counts = [-(-length // 64) for length in cu_seqlens.diff().tolist()]
        assert chunk_offsets is not None and chunk_offsets.tolist() == [0, *np.cumsum(counts)]
    if initial_state is not None:
        assert initial_state.is_contiguous()
        initial_state = initial_state.transpose(-1, -2)
    o, final = chunked(q, k, v, g, beta, initial_state, cu_seqlens, use_qk_l2norm_in_kernel)
    return o, final.transpose(-1, -2).contiguous()


def flashinfer(q, k, v, g, beta, initial_state, output_final_state, cu_seqlens, output, output_state):
    assert output_final_state and cu_seqlens.dtype == torch.int64 and q.is_contiguous() and g.dtype == torch.float32
    state = None if initial_state is None else initial_state.transpose(-1, -2)
    tensors = (tensor[None] for tensor in (q, k, v, g.double().log(), beta))
    o, final = chunked(*tensors, initial_state=state, cu_seqlens=cu_seqlens, use_qk_l2norm=False)
    output.copy_(o[0])
    output_state.copy_(final.transpose(-1, -2))


def chunk_o(q, k, v, h, g, chunk_size, cu_seqlens, chunk_indices):
    """`h` holds the chunks that there are, in order."""
    check_chunks(cu_seqlens, chunk_indices)
    if cu_seqlens is None:
        return to(oracle.chunk_o(*map(numbers, (q, k, v, h)), g=numbers(g), chunk_size=chunk_size), v)
    ends, (sequence, place) = cu_seqlens.numpy(), chunk_indices.numpy().T
    slots = np.full((1, q.shape[1] // chunk_size + len(ends) - 1, *h.shape[2:]), np.nan)
    slots[:, ends[sequence] // chunk_size + sequence + place] = numbers(h)
    o = oracle.chunk_o(*map(numbers, (q, k, v)), h=slots, g=numbers(g), chunk_size=chunk_size, cu_seqlens=ends)
    return to(o, v)


def fla_chunk_o(q, k, v, h, g, chunk_size, cu_seqlens=None, chunk_indices=None):
    return chunk_o(q, k, v, h, g * math.log(2), chunk_size, cu_seqlens, chunk_indices)


def vllm_chunk_o(q, k, v, h, g, chunk_size, core_attn_out, cu_seqlens=None, chunk_indices=None):
    assert h.is_contiguous() and core_attn_out.ndim == 1
    o = chunk_o(q, k, v, h.transpose(-1, -2), g, chunk_size, cu_seqlens, chunk_indices)
    return core_attn_out.copy_(o.flatten()).view(v.shape)


def recurrent(q, k, v, g, beta, A_log, dt_bias, state, indices):
    named = {"A_log": numbers(A_log), "dt_bias": numbers(dt_bias), "state_indices": indices, "sigmoid_beta": True}
    o, new = oracle.fused_recurrent_gated_delta_rule(
        *map(numbers, (q, k, v, g, beta, state)), **named, use_qk_l2norm=True
    )
    return to(o, v), to(new, state)


def vllm_decode(mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices, use_qk_l2norm_in_kernel):
    H_v, V, K = initial_state.shape[1:]
    assert use_qk_l2norm_in_kernel and scale == K**-0.5 and out.shape[1] == 1 and (ssm_state_indices > 0).all()
    H_k = (mixed_qkv.shape[1] // K - H_v * V // K) // 2
    q, k, v = mixed_qkv.split([H_k * K, H_k * K, H_v * V], dim=1)
    q, k, v = q.unflatten(1, (H_k, K)), k.unflatten(1, (H_k, K)), v.unflatten(1, (H_v, V))
    state = initial_state.transpose(-1, -2)
    o, new = recurrent(q, k, v, a, b, A_log, dt_bias, state, ssm_state_indices.numpy())
    out[:, 0], _ = o, state.copy_(new)


def fla_decode(
    q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias,
    use_beta_sigmoid_in_kernel,
):  # fmt: skip
    assert output_final_state and use_qk_l2norm_in_kernel and use_gate_in_kernel and use_beta_sigmoid_in_kernel
    one = (tensor[:, 0] for tensor in (q, k, v, g, beta))
    o, new = recurrent(*one, A_log=A_log, dt_bias=dt_bias, state=initial_state, indices=np.arange(len(q)))
    return o[:, None], new


def flashinfer_decode(
    q, k, v, state, A_log, a, dt_bias, b, output, use_qk_l2norm, initial_state, initial_state_indices
):  # fmt: skip
    assert state is None and use_qk_l2norm and initial_state.stride(-1) == 1
    one = (tensor[:, 0] for tensor in (q, k, v, a, b))
    pool = initial_state.transpose(-1, -2)
    o, new = recurrent(*one, A_log=A_log, dt_bias=dt_bias, state=pool, indices=initial_state_indices.numpy())
    output[:, 0], _ = o, pool.copy_(new)


STAND_INS = {
    CHUNKED.name: {"vllm": vllm, "fla": fla, "flash_qla": flash_qla, "flashinfer": flashinfer},
    CHUNK_O.name: {"vllm": vllm_chunk_o, "fla": fla_chunk_o},
    DECODE.name: {"vllm": vllm_decode, "fla": fla_decode, "flashinfer": flashinfer_decode},
}


@EACH
def test_peers_are_called_the_way_they_want_it(case):
    op = op_of(case)
    in_torch = [peer for peer in op.peers if peer.framework == "torch"]
    assert {peer.name for peer in in_torch} == STAND_INS[op.name].keys()
    for peer in in_torch:
        # These sizes are not what FlashQLA and FlashInfer are made for, but their stand-ins are.
        if peer.name in ("flash_qla", "flashinfer") and case.options.get("l2norm") and op is CHUNKED:
            continue
        lab = Lab(op, PeerImplementation(CPU, peer, STAND_INS[op.name][peer.name]), NO_CLOCK, Storage(CPU))
        for _ in range(2):
            wrong, errors = lab.check(case, None)
            assert wrong is None, peer.name
            # FLA's decode has no slots: its states are its own affair.
            own = op is DECODE and peer.name == "fla"
            assert set(errors) == {"y", *(() if own else op.after_y(op.operands(case)))}


def test_peers_take_what_they_are_made_for():
    wide = CHUNKED.sweeps["H32"].case(1024, "bfloat16")
    cases = (wide, CHUNKED.sweeps["H32"].case(1024, "float32"), CASES[0])
    takes = {peer.name: [peer.takes(case) for case in cases] for peer in CHUNKED.peers}
    assert takes == {
        "vllm": [True, False, True], "fla": [True, False, True], "flash_qla": [True, False, False],
        "flashinfer": [True, False, False], "maxtext": [True, True, True],
    }  # fmt: skip


@pytest.mark.parametrize("op", [CHUNKED, CHUNK_O, DECODE], ids=lambda op: op.name)
def test_a_peer_that_is_not_there_is_named_as_missing(op, monkeypatch):
    def nothing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(peers.importlib, "import_module", nothing)
    present, missing = peers.find(OPS[op.name].peers)
    assert not present and set(missing) == set(OPS[op.name].peers)
    assert all("No module named" in reason for reason in missing.values())


def test_vllm_is_found_under_its_older_name_too(monkeypatch):
    class Older:
        chunk_gated_delta_rule = staticmethod(vllm)

    def only_older(name):
        if name == "vllm.model_executor.layers.fla.ops.chunk":
            return Older
        raise ImportError(name)

    monkeypatch.setattr(peers.importlib, "import_module", only_older)
    (peer,) = (peer for peer in CHUNKED.peers if peer.name == "vllm")
    assert peer.load() is vllm
