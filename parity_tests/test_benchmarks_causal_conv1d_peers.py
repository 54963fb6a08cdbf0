"""How the convolutions' peers are called: layouts, metadata and results, by stand-ins that compute with the oracle."""

import dataclasses

import numpy as np
import torch

from benchmarks.implementations import PeerImplementation
from benchmarks.lab import Lab
from benchmarks.op import Storage

from . import oracle
from .test_benchmarks_causal_conv1d import CASES, CPU, EACH, NO_CLOCK, PREFILL, UPDATE, op_of, prefill


def _channel_major(tensor, channels):
    """[…, channels, rows] with dense channels is what vLLM and Dao's library take."""
    assert tensor.shape[-2] == channels and tensor.stride(-2) == 1
    return tensor.transpose(-1, -2)


def _numbers(tensor):
    return tensor.double().numpy()


def vllm_fn(x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, activation, null_block_id,
            metadata):  # fmt: skip
    assert (null_block_id, query_start_loc.dtype, cache_indices.dtype) == (-1, torch.int32, torch.int32)
    D = weight.shape[0]
    states, rows = _channel_major(conv_states, D), _channel_major(x, D)
    bounds = query_start_loc.tolist()
    covered = []
    block = metadata.nums_dict[8]
    assert block["tot"] == block["mlist_len"] == len(block["batch_ptr"])
    for n, i in zip(metadata.batch_ptr.tolist(), metadata.token_chunk_offset_ptr.tolist(), strict=True):
        covered += range(bounds[n] + 8 * i, min(bounds[n] + 8 * i + 8, bounds[n + 1]))
    assert covered == list(range(len(rows)))
    y, new = oracle.causal_conv1d(
        _numbers(rows)[None], _numbers(weight), bias=_numbers(bias), activation=activation, cu_seqlens=np.array(bounds),
        conv_state=_numbers(states), state_indices=cache_indices.numpy(), has_initial_state=has_initial_state.numpy(),
    )  # fmt: skip
    states.copy_(torch.from_numpy(new))
    return torch.from_numpy(y[0]).to(x.dtype).T


def fla_fn(x, weight, bias, residual, initial_state, output_final_state, activation, cu_seqlens=None, chunk_indices=()):
    assert residual is None and output_final_state
    N_seq = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().tolist()
        assert len(chunk_indices) == sum(-(-length // 64) for length in lengths) and cu_seqlens.dtype == torch.int64
    state = None
    if initial_state is not None:
        assert initial_state.shape == (N_seq, *weight.shape) and initial_state.is_contiguous()
        state = _numbers(initial_state[..., 1:].transpose(1, 2))
    y, final = oracle.causal_conv1d(
        _numbers(x), _numbers(weight), bias=_numbers(bias), activation=activation, initial_state=state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.numpy(),
    )  # fmt: skip
    padded = torch.nn.functional.pad(torch.from_numpy(final).transpose(1, 2), (1, 0))
    return torch.from_numpy(y).to(x.dtype), padded.to(x.dtype)


def dao_fn(x, weight, bias, initial_states, return_final_states, activation):
    assert return_final_states
    state = None if initial_states is None else _numbers(_channel_major(initial_states, len(weight)))
    rows = _numbers(_channel_major(x, len(weight)))
    y, final = oracle.causal_conv1d(
        rows, _numbers(weight), bias=_numbers(bias), activation=activation, initial_state=state
    )
    return (torch.from_numpy(one).to(x.dtype).transpose(1, 2) for one in (y, final))


def vllm_update(x, conv_state, weight, bias, activation, conv_state_indices, null_block_id=-1, out=None):
    assert null_block_id == -1
    states = _channel_major(conv_state, len(weight))
    y, new = oracle.causal_conv1d_update(
        _numbers(x), _numbers(states), _numbers(weight), bias=_numbers(bias), activation=activation,
        conv_state_indices=conv_state_indices.numpy(),
    )  # fmt: skip
    states.copy_(torch.from_numpy(new))
    y = torch.from_numpy(y).to(x.dtype)
    return y if out is None else out.copy_(y)


def fla_update(x, cache, weight, bias, activation):
    assert cache.shape == (len(x), *weight.shape) and cache.is_contiguous()
    y, _ = oracle.causal_conv1d_update(
        _numbers(x),
        _numbers(cache[..., 1:].transpose(1, 2)),
        _numbers(weight),
        bias=_numbers(bias),
        activation=activation,
    )
    return torch.from_numpy(y).to(x.dtype), cache


STAND_INS = {
    PREFILL.name: {"vllm": vllm_fn, "fla": fla_fn, "fla_gluon": fla_fn, "causal_conv1d": dao_fn},
    UPDATE.name: {"vllm": vllm_update, "fla": fla_update, "causal_conv1d": vllm_update},
}


@EACH
def test_peers_are_called_the_way_they_want_it(case):
    op = op_of(case)
    names = {peer.name for peer in op.peers}
    assert names == STAND_INS[op.name].keys()
    for peer in (peer for peer in op.peers if peer.takes(case)):
        lab = Lab(op, PeerImplementation(CPU, peer, STAND_INS[op.name][peer.name]), NO_CLOCK, Storage(CPU))
        for _ in range(2):
            wrong, errors = lab.check(case, None)
            assert wrong is None, peer.name
            # a state of its own is its own affair
            ours = {"y", *op.after_y(op.operands(case))}
            assert set(errors) == (
                ours if peer.name in ("vllm", "causal_conv1d") or "conv_state" not in ours else {"y"}
            )


def test_peers_take_what_they_are_made_for():
    takes = {
        peer.name: [peer.takes(case) for case in (CASES[0], CASES[5], prefill("wide", W=5))] for peer in PREFILL.peers
    }
    assert takes == {
        "vllm": [True, True, False], "fla": [True, True, True], "fla_gluon": [True, True, False],
        "causal_conv1d": [False, True, False],
    }  # fmt: skip


def test_an_autotuner_is_not_warmed_up_on_another_shape():
    calls = []
    (peer,) = (peer for peer in PREFILL.peers if peer.autotunes)
    implementation = PeerImplementation(CPU, peer, lambda x, *_, **__: calls.append(x.shape))
    implementation.compile(PREFILL, CASES[0], None)
    assert not calls
    plain = PeerImplementation(CPU, dataclasses.replace(peer, autotunes=False), fla_fn)
    plain.compile(PREFILL, CASES[0], None)
