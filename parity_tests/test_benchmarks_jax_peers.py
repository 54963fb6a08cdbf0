"""How the peers written in JAX are called, by stand-ins that compute with our XLA form."""

from typing import Any

import jax.numpy as jnp
import pytest
import torch

import pallas_ssm
from benchmarks import host_command
from benchmarks.implementations import JaxPeerImplementation, of_peer
from benchmarks.lab import Lab
from benchmarks.machine import Machine
from benchmarks.op import Storage
from benchmarks.ops import OPS

from .cases import select
from .test_benchmarks_gdn import CPU, NO_CLOCK


def bonsai(
    x, dt, A, B_mat, C_mat, chunk_size, D, dt_bias, dt_min, dt_max, initial_states=None, return_final_states=False
):  # fmt: skip
    assert return_final_states and B_mat.shape[2] == C_mat.shape[2] == x.shape[2] and dt.dtype == jnp.float32
    assert initial_states is None or initial_states.shape[1] == 1
    results: Any = pallas_ssm.mamba_chunk_scan_combined(
        x, dt, A, B_mat, C_mat, chunk_size=chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True, dt_limit=(dt_min, dt_max),
        initial_states=None if initial_states is None else initial_states[:, 0], return_final_states=True,
        implementation="xla",
    )  # fmt: skip
    y, final = results
    return y.astype(jnp.float32), final


def maxtext(
    query, key, value, g, beta, chunk_size=64, initial_state=None, use_qk_norm_in_gdn=False, compute_dtype=jnp.bfloat16
):
    assert query.shape[2] == key.shape[2] == value.shape[2] and compute_dtype == value.dtype
    o, final = pallas_ssm.chunk_gated_delta_rule(
        query, key, value, g, beta, chunk_size=chunk_size, initial_state=initial_state, use_qk_l2norm=use_qk_norm_in_gdn,
        return_final_state=True, implementation="xla",
    )  # fmt: skip
    return o, final if initial_state is not None else None


STAND_INS = {
    "mamba_chunk_scan_combined": ("bonsai", bonsai),
    "chunk_gated_delta_rule": ("maxtext", maxtext),
}


def implementation(op: str) -> JaxPeerImplementation:
    name, function = STAND_INS[op]
    (peer,) = (peer for peer in OPS[op].peers if peer.framework == "jax")
    assert peer.name == name
    made = of_peer(CPU, peer, function)
    assert isinstance(made, JaxPeerImplementation) and made.name == f"peer:{name}" and made.framework == "jax"
    return made


CASES = [
    case for op in STAND_INS for case in select(op=op, tags=("ci",))
    if {"initial", "slow", "D", "l2norm"} >= set(case.options) and (op == "chunk_gated_delta_rule" or "D" in case.options)
]  # fmt: skip


@pytest.mark.parametrize("op", STAND_INS)
def test_they_are_called_the_way_they_want_it(op):
    cases = [case for case in CASES if case.op == op][:2] or [
        OPS[op].single(next(iter(select(op=op, tags=("standard",)))))
    ]
    lab = Lab(OPS[op], implementation(op), NO_CLOCK, Storage(CPU))
    for case in cases:
        wrong, errors = lab.check(case, None)
        assert wrong is None and set(errors) == {"y", "final"}


@pytest.mark.parametrize("op", STAND_INS)
def test_they_take_whole_sequences_of_models(op):
    made = implementation(op)
    sweeps = OPS[op].sweeps
    dense, packed = ("H128", "H128-packed") if "scan" in op else ("H32", "H32-packed")
    assert made.takes(sweeps[dense].case(8192, "bfloat16")) and not made.takes(sweeps[packed].case(8192, "bfloat16"))
    assert not made.takes(sweeps[dense].case(65536, "bfloat16"))  # XLA compiles every length anew


def test_the_host_dispatches_them():
    op = OPS["chunk_gated_delta_rule"]
    machine = Machine(CPU, None, NO_CLOCK)  # pyright: ignore[reportArgumentType]
    case = select(op=op.name, tags=("ci",))[0]
    row = host_command.measure(op, case, implementation(op.name), machine, calls=3)
    assert row.implementation == "peer:maxtext" and row.us > 0


def test_torch_peers_stay_torch():
    peer = OPS["mamba_chunk_scan_combined"].peers[0]
    assert of_peer(torch.device("cpu"), peer, lambda: None).framework == peer.framework == "torch"
