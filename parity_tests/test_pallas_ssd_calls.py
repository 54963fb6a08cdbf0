"""How `pallas_ssm`'s SSD operators are called: errors, what runs and why, and the twin's names."""

import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_ssm
import triton_ssm
from pallas_ssm.ssd import _dispatch as dispatch

from .cases import SSD_STAGES, Case, select
from .inputs import draw
from .interpret_mosaic import interpreted
from .operators import OPERATORS

COMBINED = "mamba_chunk_scan_combined"
OPS = (COMBINED, *SSD_STAGES)
NAMES = {
    "ssd.chunk_cumsum": ("dt", "A"),
    "ssd.chunk_state": ("x", "B", "dt", "dA_cumsum"),
    "ssd.state_passing": ("states", "dA_cumsum"),
    "ssd.bmm_chunk": ("C", "B"),
    "ssd.chunk_scan": ("CB", "x", "dt", "dA_cumsum", "C", "states"),
    COMBINED: ("x", "dt", "A", "B", "C"),
}
pytestmark = pytest.mark.filterwarnings("ignore::ssm_configs.TableWarning")


def arguments_of(
    op: str, dtype: str = "float32", P: int = 4, N: int = 4, L: int = 16, **options: Any
) -> dict[str, Any]:
    """Every argument by name, arrays as JAX's."""
    options = {"lengths": (9, 0, 18), "tail": 2, "D": True, "z": True, "initial": True} | options
    T = sum(options["lengths"]) + options["tail"]
    dims = {"B": 1, "T": T, "H": 4, "G": 2, "P": P, "N": N, "L": L}
    arguments, keywords = draw(Case(op, "call", dims, dtype, "float32", options))
    named = dict(zip(NAMES[op], arguments, strict=True)) | keywords
    return {name: jnp.asarray(value) if isinstance(value, np.ndarray) else value for name, value in named.items()}


def call(op: str, given: dict[str, Any], **more: Any) -> Any:
    return OPERATORS[op].function(pallas_ssm, given)(**given, **more)


@pytest.mark.parametrize("op", OPS)
def test_the_twin_has_the_same_arguments(op):
    ours, theirs = (OPERATORS[op].function(package, {}) for package in (pallas_ssm, triton_ssm))
    only_theirs = {"out", "final_states_out", "final_state_indices"}
    names = [name for name in inspect.signature(theirs).parameters if name not in only_theirs]
    assert [*names, "implementation"] == list(inspect.signature(ours).parameters)
    for name, parameter in inspect.signature(theirs).parameters.items():
        if name not in only_theirs | {"state_dtype"}:
            mine = inspect.signature(ours).parameters[name]
            assert (mine.kind, mine.default) == (parameter.kind, parameter.default), name


def test_the_twin_has_the_same_operators():
    assert pallas_ssm.ssd.__all__ == triton_ssm.ssd.__all__
    assert pallas_ssm.mamba_chunk_scan_combined is pallas_ssm.ssd.mamba_chunk_scan_combined


@pytest.mark.parametrize(
    "op, name", [(op, name) for op in OPS for name, value in arguments_of(op).items() if isinstance(value, jax.Array)]
)
def test_every_array_is_checked(op, name):
    given = arguments_of(op)
    with pytest.raises(TypeError, match=f"^{name}: expected an array, got list"):
        call(op, given | {name: [1.0]})
    # One axis more than it may have.
    with pytest.raises(ValueError, match=rf"^{name}: expected (shape|rank)"):
        call(op, given | {name: given[name][None]})
    wrong = jnp.complex64 if name != "cu_seqlens" else jnp.float32
    with pytest.raises(TypeError, match=f"^{name}: expected dtype"):
        call(op, given | {name: given[name].astype(wrong)})
    if name in NAMES[op]:
        with pytest.raises(TypeError, match=f"^{name}: expected an array, got None"):
            call(op, given | {name: None})


@pytest.mark.parametrize(
    "op, wrong, message",
    [
        (COMBINED, {"chunk_size": 24}, "chunk_size: expected a power of two"),
        (COMBINED, {"chunk_size": 16.0}, "chunk_size: expected an int"),
        (COMBINED, {"dt_limit": (1, 0)}, "dt_limit: expected 0 <= low <= high"),
        (COMBINED, {"dt_limit": 1}, "dt_limit: expected a pair of numbers"),
        (COMBINED, {"dt_limit": (10**400, 1)}, "dt_limit: expected 0 <= low <= high"),
        (COMBINED, {"dt_softplus": 1}, "dt_softplus: expected a bool"),
        (COMBINED, {"return_final_states": None}, "return_final_states: expected a bool"),
        (COMBINED, {"return_intermediate_states": 0}, "return_intermediate_states: expected a bool"),
        (COMBINED, {"chunk_aligned": "no"}, "chunk_aligned: expected a bool"),
        (COMBINED, {"precision": "high"}, "precision: expected 'ieee' or 'tf32'"),
        (COMBINED, {"state_dtype": "float8"}, "state_dtype: expected a dtype"),
        (COMBINED, {"state_dtype": jnp.int32}, "state_dtype: expected dtype float32"),
        (COMBINED, {"implementation": "triton"}, "implementation: expected one of"),
        (COMBINED, {"cu_seqlens": np.array([0, 9, 8, 27])}, "cu_seqlens: expected 0 <= "),
        (COMBINED, {"cu_seqlens": np.array([0, 9, 9, 30])}, "cu_seqlens: expected 0 <= "),
        (COMBINED, {"chunk_aligned": True}, "x: expected shape"),
        (COMBINED, {"B": jnp.zeros((1, 29, 3, 4))}, "B: expected G to divide H=4, got G=3"),
        (COMBINED, {"z": jnp.zeros((1, 29, 4, 4), jnp.bfloat16)}, "z: expected the dtype of x"),
        ("ssd.chunk_cumsum", {"dt_softplus": "yes"}, "dt_softplus: expected a bool"),
        ("ssd.chunk_cumsum", {"dt_limit": (0, float("nan"))}, "dt_limit: expected 0 <= low"),
        ("ssd.chunk_cumsum", {"chunk_size": 4096}, "chunk_size: expected a power of two"),
        ("ssd.bmm_chunk", {"precision": None}, "precision: expected"),
        ("ssd.state_passing", {"state_dtype": "nothing"}, "state_dtype: expected a dtype"),
        ("ssd.state_passing", {"states": jnp.zeros((1, 2, 4, 4, 4)), "dA_cumsum": jnp.zeros((1, 4, 2, 16))},
         "states: expected a chunk slot for each of 3 sequences, got NC=2"),
        ("ssd.chunk_scan", {"implementation": True}, "implementation: expected one of"),
    ],
)  # fmt: skip
def test_every_option_is_checked(op, wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(op, arguments_of(op) | wrong)


@pytest.mark.parametrize("op", OPS)
def test_explain_tells_what_runs_and_why(op):
    given = arguments_of(op)
    shapes: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype) if isinstance(value, jax.Array) else value
        for name, value in given.items()
    }
    for arguments in (given, shapes):
        explanation = pallas_ssm.explain(op, **arguments)
        assert str(explanation) == f"{op}: xla (the mosaic_gpu kernel does not run on a CPU outside " + (
            "plgpu.force_gpu_interpret_mode(...); use implementation='xla' or None)"
        )
    positional = [given.pop(name) for name in NAMES[op]]
    assert pallas_ssm.explain(op, *positional, **given, implementation="xla").reason == "asked for"
    with pytest.raises(NotImplementedError, match=rf"^{op}: the mosaic_gpu kernel does not run on a CPU"):
        pallas_ssm.explain(op, *positional, **given, implementation="mosaic_gpu")
    with pytest.raises(TypeError, match="unexpected keyword argument 'chunks'"):
        pallas_ssm.explain(op, *positional, **given, chunks=3)


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("ssd.chunk_cumsum", "ssd.state_passing")])
def test_none_takes_xla_where_the_kernel_declines(op):
    given = arguments_of(op)
    expected = call(op, given, implementation="xla")
    with interpreted():
        explanation = pallas_ssm.explain(op, **given)
        got = call(op, given)
        with pytest.raises(NotImplementedError, match="16-bit inputs, got float32"):
            call(op, given, implementation="mosaic_gpu")
    assert explanation.implementation == "xla" and "got float32" in explanation.reason
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_the_table_has_the_last_word_on_the_fused_path():
    given = arguments_of(COMBINED, "bfloat16", P=64, N=64)
    with interpreted():
        fused = pallas_ssm.explain(COMBINED, **given)
        assert fused.launch.FUSED and "NVIDIA H200" in str(fused)
        with pallas_ssm.override(COMBINED, twin="pallas", FUSED=False):
            staged = pallas_ssm.explain(COMBINED, **given)
            assert (staged.implementation, staged.launch.chunk_size) == ("mosaic_gpu", 64) and "override" in str(staged)
            wanted = pallas_ssm.explain(COMBINED, **given, return_intermediate_states=True)
            assert wanted.implementation == "xla" and "no intermediate states" in wanted.reason
            with pytest.raises(NotImplementedError, match="no intermediate states"):
                call(COMBINED, given, return_intermediate_states=True, implementation="mosaic_gpu")


def test_the_stages_serve_what_the_fused_path_does_not():
    """And what neither does tells why the fused one does not."""
    with interpreted():
        assert pallas_ssm.explain(COMBINED, **arguments_of(COMBINED, "bfloat16", P=64, N=192)).launch.chunk_size == 64
        neither = pallas_ssm.explain(COMBINED, **arguments_of(COMBINED, "bfloat16", P=64, N=48))
        assert neither.implementation == "xla" and "needs N in" in neither.reason


def test_an_override_traces_anew(monkeypatch):
    given = arguments_of(COMBINED, "bfloat16", P=64, N=64)
    asked = []

    def seen(static: Any, device: Any, config: Any) -> Any:
        asked.append(config["FUSED"])
        raise dispatch.Unsupported("not now")

    monkeypatch.setattr(dispatch, "_plan_combined", seen)
    arrays = {name: value for name, value in given.items() if isinstance(value, jax.Array)}
    others = {name: value for name, value in given.items() if name not in arrays}
    function = jax.jit(lambda arrays: call(COMBINED, arrays | others)[0])
    with interpreted():
        for _ in range(2):
            function(arrays)
        with pallas_ssm.override(COMBINED, twin="pallas", FUSED=False):
            function(arrays)
        function(arrays)
    assert asked == [True, False]


def test_importing_it_imports_no_other_framework():
    module = importlib.import_module("pallas_ssm.ssd")
    assert "torch" not in vars(module) and all(hasattr(module, name) for name in module.__all__)


def test_ci_has_cases_of_every_operator():
    assert all(select(op=op, tags=("ci",)) for op in OPS)
