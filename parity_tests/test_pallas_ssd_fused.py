"""The fused Mosaic GPU path of `mamba_chunk_scan_combined`, interpreted with race detection on, against the oracle."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_ssm
from pallas_ssm._selective_state_update_launch import Unsupported
from pallas_ssm.ssd import _fused
from pallas_ssm.ssd._dispatch import prepare_combined
from pallas_ssm.ssd._fused_pieces import cut
from ssm_configs import Device, override

from .cases import Case, select
from .compare import against_oracle
from .inputs import draw
from .interpret_mosaic import interpreted
from .operators import OPERATORS, oracle_results
from .runners import jax_runner

OP = "mamba_chunk_scan_combined"
CI = [case for case in select(op=OP, tags=("ci",)) if "no-mosaic" not in case.tags]
H200 = Device("NVIDIA H200", (9, 0))
CONFIG = {"FUSED": True, "CHUNKS_PER_PIECE": 65536, "num_stages": 4}
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


def pinned(**knobs: Any) -> Any:
    return override(OP, twin="pallas", **(CONFIG | knobs))


def check(case: Case, seed: int = 0) -> None:
    arguments, keywords = draw(case, seed)
    result = jax_runner(OPERATORS[OP], None, True, implementation="mosaic_gpu")(arguments, keywords)
    for comparison in against_oracle(case, arguments, keywords, result, oracle_results(case, arguments, keywords)):
        assert comparison.ok, (comparison, case)


@pytest.mark.parametrize("case", CI, ids=str)
def test_registry(case: Case):
    with pinned():
        check(case)


@st.composite
def drawn(draw_from) -> Case:
    options = draw_from(
        st.fixed_dictionaries(
            {
                "D": st.booleans(),
                "D_per_headdim": st.booleans(),
                "z": st.booleans(),
                "initial": st.booleans(),
                "slow": st.booleans(),
                "chunk_aligned": st.booleans(),
                "return_intermediate_states": st.booleans(),
            }
        )
    )
    B, T = draw_from(st.integers(1, 2)), draw_from(st.integers(1, 150))
    if draw_from(st.booleans()):
        lengths = draw_from(st.lists(st.integers(0, 90), min_size=1, max_size=4))
        options |= {
            "lengths": tuple(lengths),
            "tail": draw_from(st.integers(0 if sum(lengths) else 1, 70)),
            "poison": True,
        }
        B, T = 1, sum(lengths) + options["tail"]
        options["poison"] &= not options["chunk_aligned"]
    dims = {"B": B, "T": T, "H": 2, "G": draw_from(st.integers(1, 2)), "L": draw_from(st.sampled_from([64, 128]))}
    dims |= dict(zip("PN", draw_from(st.sampled_from([(64, 64), (64, 128), (80, 64)])), strict=True))
    dtype = draw_from(st.sampled_from(["bfloat16", "float16"]))
    return Case(OP, "drawn", dims, dtype, draw_from(st.sampled_from(["float32", dtype])), options)


@settings(max_examples=6, deadline=None)
@given(case=drawn(), seed=st.integers(0, 100), piece=st.sampled_from([1, 2, 65536]), stages=st.sampled_from([2, 4]))
def test_drawn_calls_and_launches(case: Case, seed: int, piece: int, stages: int):
    with pinned(CHUNKS_PER_PIECE=piece, num_stages=stages):
        check(case, seed)


def small(lengths: tuple[int, ...] | None, T: int = 200, **options: Any) -> Case:
    """Slow decay: what is wrong where pieces meet stays visible."""
    dims = {"B": 1, "T": T if lengths is None else sum(lengths), "H": 2, "G": 1, "P": 64, "N": 64, "L": 64}
    full = {"D": True, "initial": True, "slow": True} | ({} if lengths is None else {"lengths": lengths})
    return Case(OP, "small", dims, "bfloat16", "float32", full | options)


def arrays_of(case: Case) -> dict[str, Any]:
    arguments, keywords = draw(case)
    named = dict(zip(("x", "dt", "A", "B", "C"), arguments, strict=True)) | keywords
    return {name: jnp.asarray(value) if isinstance(value, np.ndarray) else value for name, value in named.items()}


def calls(*named: dict[str, Any]) -> list[tuple[np.ndarray, ...]]:
    """The operator on each of these, which differ in arrays' values or shapes alone, under one jit; a fresh one, because what
    was traced outside the interpreter would not be interpreted."""
    static = {name: value for name, value in named[0].items() if not isinstance(value, jax.Array)}

    @jax.jit
    def run(dynamic: dict[str, Any]) -> Any:
        return pallas_ssm.mamba_chunk_scan_combined(**dynamic, **static, implementation="mosaic_gpu")

    with interpreted():
        dynamic = [{name: value for name, value in one.items() if name not in static} for one in named]
        return [tuple(np.asarray(array) for array in jax.block_until_ready(run(one))) for one in dynamic]


@pytest.mark.parametrize(
    ("piece", "case"),
    [(1, small((330, 0, 70), return_intermediate_states=True)), (2, small(None, 330))],
    ids=["a chunk each, packed", "two chunks each, the last one"],
)
def test_pieces_carry_a_slow_state(piece: int, case: Case):
    with pinned(CHUNKS_PER_PIECE=piece):
        check(case)


def test_sequences_that_end_anywhere_in_channels_that_are_no_whole_tiles():
    with pinned(CHUNKS_PER_PIECE=1):
        check(small((65, 0, 1), z=True, tail=6, poison=True).with_dims(T=72, H=1, P=80))


def test_a_lone_row_leaves_in_copies_no_wider_than_its_channels(monkeypatch: pytest.MonkeyPatch):
    """The interpreter clips every copy; on a GPU that of a single row is not."""
    widths, copy = set(), plgpu.copy_smem_to_gmem

    def record(tile: Any, target: Any) -> None:
        if tile.shape[-2] == 1:
            widths.add(tile.shape[-1])
        copy(tile, target)

    monkeypatch.setattr(plgpu, "copy_smem_to_gmem", record)
    for P, expected in ((64, {64}), (72, {8, 56}), (80, {16, 48}), (96, {32})):
        named = arrays_of(small((70,)).with_dims(P=P))
        with pinned(), interpreted():
            jax.make_jaxpr(lambda cu, n=named: pallas_ssm.mamba_chunk_scan_combined(
                **n | {"cu_seqlens": cu}, implementation="mosaic_gpu"
            ))(named["cu_seqlens"])  # fmt: skip
        assert widths == expected, P
        widths.clear()


def test_a_sequence_has_the_same_bits_whatever_else_is_packed():
    named = arrays_of(small((70, 0, 133, 5)))
    rows = slice(70, 203)
    alone = {name: named[name][:, rows] for name in ("x", "dt", "B", "C")}
    alone = named | alone | {"initial_states": named["initial_states"][2:3], "cu_seqlens": jnp.array([0, 133])}
    with pinned(CHUNKS_PER_PIECE=1):
        (y, final), (y_alone, final_alone) = calls(named, alone)
    assert y[:, rows].tobytes() == y_alone.tobytes()
    assert final[2:3].tobytes() == final_alone.tobytes()


def test_neither_stages_nor_repetition_change_a_bit():
    named = arrays_of(small((300,)))
    results = set()
    for stages, repetitions in ((4, 2), (2, 1)):
        with pinned(num_stages=stages):
            results |= {tuple(array.tobytes() for array in found) for found in calls(*[named] * repetitions)}
    assert len(results) == 1


@pytest.mark.parametrize("piece", [1, 65536])
def test_what_other_sequences_hold_does_not_matter(piece: int):
    """NaN there included: in every operand, right before and right behind."""
    named = arrays_of(small((70, 91, 40), z=True))
    tokens = np.arange(201)
    others = jnp.asarray((tokens < 70) | (tokens >= 161))
    spoilt = dict(named)
    for name in ("x", "dt", "B", "C", "z"):
        spoilt[name] = jnp.where(others.reshape(1, -1, *[1] * (named[name].ndim - 2)), jnp.nan, named[name])
    spoilt["initial_states"] = named["initial_states"].at[0].set(jnp.nan).at[2].set(jnp.inf)
    with pinned(CHUNKS_PER_PIECE=piece):
        (y, final), (y_spoilt, final_spoilt) = calls(named, spoilt)
    assert np.isfinite(y_spoilt[:, 70:161].astype(np.float32)).all()
    assert y[:, 70:161].tobytes() == y_spoilt[:, 70:161].tobytes()
    assert final[1].tobytes() == final_spoilt[1].tobytes()


def test_bounds_are_only_data():
    """Wherever they lie nothing outside the tokens is touched (the interpreter would see it), nor is a token left unwritten."""
    named = arrays_of(small((60, 40, 30), initial=False))
    wild = ([0, 70, 500, 600], [-7, -5, 60, 130], [7, 60, 60, 100], [0, 0, 0, 0])
    with pinned(CHUNKS_PER_PIECE=1):
        results = calls(*(named | {"cu_seqlens": jnp.array(bounds)} for bounds in wild))
    for y, final in results:
        assert np.isfinite(y.astype(np.float32)).all()
        assert np.isfinite(final).all()
    assert not results[-1][0].any()
    assert not results[-1][1].any()


def static_of(**changes: Any) -> Any:
    shapes = {"T": 128, "H": 2, "G": 1, "P": 64, "N": 64} | {k: v for k, v in changes.items() if k in "THGPN"}
    T, H, G, P, N = (shapes[name] for name in "THGPN")
    dtype = changes.get("dtype", jnp.bfloat16)
    arrays = {
        "x": jnp.zeros((1, T, H, P), dtype), "dt": jnp.zeros((1, T, H), dtype), "A": jnp.zeros((H,)),
        "B": jnp.zeros((1, T, G, N), dtype), "C": jnp.zeros((1, T, G, N), dtype),
    }  # fmt: skip
    options = {name: changes[name] for name in ("chunk_size", "return_intermediate_states") if name in changes}
    given: dict[str, Any] = {"chunk_size": 64} | arrays | options
    return prepare_combined(**given).static


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": jnp.float32}, "16-bit inputs, got float32"),
        ({"N": 96}, "N in (64, 128, 256), got 96"),
        ({"P": 32}, "P in multiples of 8 from 64 on, got 32"),
        ({"P": 68}, "P in multiples of 8 from 64 on, got 68"),
        ({"chunk_size": 32, "return_intermediate_states": True}, "got chunk_size=32"),
    ],
)
def test_what_the_kernel_does_not_take(changes: dict[str, Any], reason: str):
    with pytest.raises(Unsupported, match="the mosaic_gpu kernel") as raised:
        _fused.plan(static_of(**changes), H200, CONFIG)
    assert reason in str(raised.value)
    with pytest.raises(Unsupported, match="compute capability"):
        _fused.plan(static_of(), Device("NVIDIA B200", (10, 0)), CONFIG)


def test_a_launch_is_a_static_argument():
    launch = _fused.plan(static_of(T=4096, N=128), H200, CONFIG | {"CHUNKS_PER_PIECE": 16})
    assert (launch.CHUNKS_PER_PIECE, launch.num_stages, launch.scores) == (16, 4, 2)
    assert launch.cut.slots == 4
    assert hash(launch) == hash(replace(launch))
    # Four chunks of 256 states do not fit in shared memory.
    assert _fused.plan(static_of(N=256), H200, CONFIG).num_stages == 2


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 400), min_size=1, max_size=6), tail=st.integers(0, 100), piece=st.integers(1, 8))
def test_every_piece_has_a_slot_of_its_own(lengths: list[int], tail: int, piece: int):
    T = sum(lengths) + tail
    if T == 0:
        return
    static = static_of()
    static = replace(static, dims=replace(static.dims, T=T, packed=True, N_seq=len(lengths)))
    pieces = cut(static, piece)
    bounds = [0, *np.cumsum(lengths).tolist(), T]
    taken = [
        begin // pieces.tokens + n + k
        for n, (begin, end) in enumerate(pairwise(bounds))
        for k in range(max(1, -(-(end - begin) // pieces.tokens)))
    ]
    assert len(set(taken)) == len(taken)
    assert max(taken) < pieces.slots
    assert pieces.several or all(length <= pieces.tokens for length in lengths)
