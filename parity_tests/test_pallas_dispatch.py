"""What `pallas_ssm` runs, when it traces anew, what it copies, and its small helpers."""

import contextvars
import functools
import os
import subprocess
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_ssm
import ssm_configs
from pallas_ssm import _selective_state_update_dispatch as dispatch
from pallas_ssm._selective_state_update_launch import plan_launch
from pallas_ssm._tiles import choose_layout
from ssm_configs.contracts.selective_state_update import Dims

from .cases import Case
from .inputs import draw
from .interpret_mosaic import interpreted

OP = "selective_state_update"
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


def call_of(state_dtype="float32", P=16, N=32, **options):
    """(arguments, array keywords, other keywords)."""
    heads = {"H": 1, "G": 1} if options.get("headless") else {"H": 4, "G": 2}
    case = Case(OP, "call", {"S": 24, "B": 4, "P": P, "N": N} | heads, "float32", state_dtype, {"D": True} | options)
    arguments, keywords = draw(case)
    arrays = {name: jnp.asarray(value) for name, value in keywords.items() if isinstance(value, np.ndarray)}
    return [jnp.asarray(a) for a in arguments], arrays, {k: v for k, v in keywords.items() if k not in arrays}


FORMS = {
    "no slots": {},
    "slots": {"slots": True},
    "destination slots": {"slots": True, "dst": True, "padding": True},
    "packed": {"slots": True, "lengths": (2, 0, 1, 3)},
    "speculative": {"spec": 2, "lengths": (2, 0, 1, 3)},
    "head-less": {"slots": True, "headless": True},
    "stochastic rounding": {"slots": True, "rounding_seed": 3, "state_dtype": "bfloat16"},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_donated_state_is_not_copied_by_xla(form):
    arguments, arrays, others = call_of(**FORMS[form])

    @functools.partial(jax.jit, donate_argnums=0)
    def function(state, rest, arrays):
        return pallas_ssm.selective_state_update(state, *rest, **arrays, **others, implementation="xla")

    state = arguments[0]
    compiled: Any = function.lower(state, arguments[1:], arrays).compile()
    name = {"float32": "f32", "bfloat16": "bf16"}[state.dtype.name]
    shape = f"{name}[{','.join(map(str, state.shape))}]"
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line and shape in line]
    assert not copies
    assert compiled.memory_analysis().alias_size_in_bytes == state.nbytes
    function(state, arguments[1:], arrays)
    assert state.is_deleted()


def test_without_donation_the_caller_keeps_the_state():
    arguments, arrays, others = call_of(slots=True)
    before = np.array(arguments[0])
    pallas_ssm.selective_state_update(*arguments, **arrays, **others, implementation="xla")
    with interpreted():
        jax.block_until_ready(pallas_ssm.selective_state_update(*arguments, **arrays, **others))
    assert np.asarray(arguments[0]).tobytes() == before.tobytes()


def test_an_override_traces_anew_and_leaves_nothing_behind(monkeypatch):
    arguments, arrays, others = call_of(slots=True)
    launched = []
    plan = dispatch.plan_launch

    def seen(*args, **kwargs):
        launched.append(plan(*args, **kwargs))
        return launched[-1]

    monkeypatch.setattr(dispatch, "plan_launch", seen)
    function = jax.jit(lambda *a: pallas_ssm.selective_state_update(*a, **arrays, **others))
    with interpreted():
        for _ in range(2):
            function(*arguments)
        (default,) = launched
        for _ in range(2):
            with pallas_ssm.override(OP, twin="pallas", BLOCK_SIZE_M=8, use_tma=False):
                function(*arguments)
        assert len(launched) == 2 and (launched[1].BLOCK_SIZE_M, launched[1].use_tma) == (8, False)
        assert launched[1] != default
        function(*arguments)
        assert len(launched) == 2
        jax.effects_barrier()


def test_an_override_that_jit_does_not_know_of_is_an_error():
    """contextvars can be copied to another thread; JAX's own context stays behind."""
    arguments, arrays, others = call_of(slots=True)
    caught = []

    def work():
        try:
            pallas_ssm.selective_state_update(*arguments, **arrays, **others)
        except RuntimeError as error:
            caught.append(error)

    with pallas_ssm.override(OP, twin="pallas", BLOCK_SIZE_M=8):
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(work,))
        thread.start()
        thread.join()
    assert "unknown to jax.jit" in str(caught[0])


def test_explain_tells_what_runs_and_why():
    arguments, arrays, others = call_of(slots=True)
    explain = functools.partial(pallas_ssm.explain, OP, *arguments, **arrays, **others)
    assert str(explain()).startswith(f"{OP}: xla (the mosaic_gpu kernel does not run on a CPU")
    assert explain(implementation="xla").implementation == "xla"
    with pytest.raises(NotImplementedError, match="on a CPU"):
        explain(implementation="mosaic_gpu")
    with interpreted(), pallas_ssm.override(OP, twin="pallas", BLOCK_SIZE_M=8, tiles_per_block=2, use_tma=True):
        explanation = explain()
        assert explanation.implementation == "mosaic_gpu" and explanation.launch.BLOCK_SIZE_M == 8
        assert "NVIDIA H200" in str(explanation) and "override" in str(explanation)
    with interpreted():
        odd, more, rest = call_of(P=5, N=24)
        assert "no register layout" in pallas_ssm.explain(OP, *odd, **more, **rest).reason
    with pytest.raises(ValueError, match="op: expected"):
        pallas_ssm.explain("ssd")


def test_explain_takes_shapes():
    arguments, arrays, others = call_of(slots=True)
    shapes = jax.eval_shape(lambda *a: a, *arguments)
    named = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}
    assert pallas_ssm.explain(OP, *shapes, **named, **others).implementation == "xla"
    with pytest.raises(TypeError, match="state: expected an array"):
        pallas_ssm.selective_state_update(*shapes, **named, **others)


def test_the_device_name_of_the_interpreter_can_be_set(monkeypatch):
    arguments, arrays, others = call_of(slots=True)
    monkeypatch.setenv("SSM_DEVICE_NAME", "NVIDIA B200")
    with interpreted():
        assert "NVIDIA B200" in str(pallas_ssm.explain(OP, *arguments, **arrays, **others))


def test_none_takes_xla_where_the_kernel_declines():
    arguments, arrays, others = call_of(P=5, N=24, slots=True)
    expected = pallas_ssm.selective_state_update(*arguments, **arrays, **others, implementation="xla")
    with interpreted():
        got = pallas_ssm.selective_state_update(*arguments, **arrays, **others)
        with pytest.raises(NotImplementedError, match=r"no register layout for a \[P=5, N=24\] float32 state"):
            pallas_ssm.selective_state_update(*arguments, **arrays, **others, implementation="mosaic_gpu")
    assert all((a == b).all() for a, b in zip(got, expected, strict=True))


def dims_of(P: int, N: int, H: int = 128, G: int = 8) -> Dims:
    return Dims(96, 64, 64, H, G, P, N, 1, False, True, True, True, True)


@pytest.mark.parametrize("P", [16, 48, 64, 80, 96, 128])
@pytest.mark.parametrize("N", [16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_legal_knob_gives_a_launch_that_covers_the_state_once(P, N, dtype):
    itemsize = jnp.dtype(dtype).itemsize
    for rows in (rows for rows in range(1, P + 1) if P % rows == 0):
        for tiles in (1, 2, 4, 8):
            for tma in (False, True):
                knobs = {"BLOCK_SIZE_M": rows, "tiles_per_block": tiles, "use_tma": tma}
                for packed in (False, True):
                    launch = plan_launch(dims_of(P, N), dtype, knobs, packed=packed, stochastic=False)
                    per_head = P // launch.BLOCK_SIZE_M
                    assert P % launch.BLOCK_SIZE_M == 0 and launch.BLOCK_SIZE_M % launch.chunk == 0
                    assert launch.chunk % launch.layout.rows == 0 and N % launch.layout.columns == 0
                    assert per_head % launch.tiles_per_block == 0 or (
                        launch.tiles_per_block % per_head == 0 and 16 % (launch.tiles_per_block // per_head) == 0
                    )
                    assert launch.tiles_per_block <= tiles
                    assert launch.use_tma == tma
                    shared = launch.tiles_per_block * launch.BLOCK_SIZE_M * N * itemsize if tma else 0
                    assert shared <= 96 * 1024


def test_knobs_are_kept_where_they_fit():
    for rows in (4, 8, 16, 32, 64):
        for tiles in (1, 2, 4):
            knobs = {"BLOCK_SIZE_M": rows, "tiles_per_block": tiles, "use_tma": True}
            launch = plan_launch(dims_of(64, 128), "float16", knobs, packed=False, stochastic=False)
            assert (launch.BLOCK_SIZE_M, launch.tiles_per_block, launch.use_tma) == tuple(knobs.values())


def test_layouts_read_16_bytes_at_a_time():
    for itemsize in (2, 4):
        layout = choose_layout(64, 128, itemsize)
        assert layout is not None and layout.vector * itemsize == 16 and layout.copies == 1
    assert choose_layout(5, 24, 4) is None


def test_bucket():
    assert [pallas_ssm.bucket(n) for n in (0, 1, 16, 17, 24, 25, 33, 48, 49, 64, 65, 97, 1000, 1537)] == [
        16, 16, 16, 24, 24, 32, 48, 48, 64, 64, 96, 128, 1024, 2048,
    ]  # fmt: skip
    buckets = {pallas_ssm.bucket(n) for n in range(1, 5000)}
    assert buckets == {1 << i for i in range(4, 13)} | {3 << i for i in range(3, 12)}
    assert [pallas_ssm.bucket(n, 64) for n in (0, 63, 64, 65, 97)] == [64, 64, 64, 96, 128]
    for smallest in (0, 24):
        with pytest.raises(ValueError, match="smallest: expected a power of two from 16 on"):
            pallas_ssm.bucket(1, smallest)
    with pytest.raises(TypeError, match="n: expected an int"):
        pallas_ssm.bucket(3.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="n: expected n >= 0, got -1"):
        pallas_ssm.bucket(-1)


def test_layouts_round_trip():
    arguments, arrays, others = call_of(slots=True, dt_bias=True)
    (state, x, dt, A, B, C), D, dt_bias = arguments, arrays.pop("D"), arrays.pop("dt_bias")
    from_them = pallas_ssm.layouts.selective_state_update_from_mamba_ssm
    theirs = pallas_ssm.layouts.selective_state_update_to_mamba_ssm(dt, A, D, dt_bias, headdim=16, dstate=32)
    assert theirs.A.shape == (4, 16, 32) and theirs.dt.shape == (4, 4, 16)
    ours = from_them(*theirs)
    assert all((a == b).all() for a, b in zip(ours, (dt, A, D, dt_bias), strict=True))

    # The repeated form means the same to the operator, which only takes longer over it.
    run = functools.partial(pallas_ssm.selective_state_update, state, x, **arrays, **others, implementation="xla")
    tied = run(dt=ours.dt, A=ours.A, B=B, C=C, D=ours.D, dt_bias=ours.dt_bias)
    repeated = run(dt=theirs.dt, A=theirs.A, B=B, C=C, D=theirs.D, dt_bias=theirs.dt_bias)
    for a, b in zip(tied, repeated, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)

    assert pallas_ssm.layouts.selective_state_update_from_vllm(*theirs, has_indices=True).null_slot == 0
    assert pallas_ssm.layouts.selective_state_update_from_vllm(*theirs, has_indices=False).null_slot is None
    _, null_block = pallas_ssm.layouts.selective_state_update_to_vllm(dt, A, headdim=16, dstate=32)
    assert null_block == -1


def run_python(code: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_importing_needs_neither_torch_nor_triton_nor_a_kernel_traced():
    code = "import sys, pallas_ssm; assert not {'torch', 'triton', 'triton_ssm'} & set(sys.modules)"
    run_python(code)


def test_importing_inside_an_override_is_an_error():
    code = """
import ssm_configs
with ssm_configs.override("selective_state_update", BLOCK_SIZE_M=4):
    try:
        import pallas_ssm
    except RuntimeError as error:
        assert "inside an active override" in str(error)
    else:
        raise AssertionError("imported")
"""
    run_python(code)


def test_pallas_reads_the_same_tables():
    assert pallas_ssm.override is ssm_configs.override
