"""Programs that `pallas_ssm.warmup` stores and loads, and which calls go to them."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import pallas_ssm
from pallas_ssm import _stored_programs, _warmup_jitted
from ssm_configs.model_dims import ModelDims
from ssm_configs.models import warming

from .configs_env import entry, forget_everything, put_table

DIMS = ModelDims(heads=2, groups=1, headdim=16, dstate=16, chunk_size=16)
ONE: dict[str, Any] = {"ops": ["causal_conv1d_update"], "max_tokens": 16, "max_batch": 16, "progress": False}
UPDATE = {"activation": "silu", "implementation": None}


CACHE = (
    "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a new process begins; and JAX's cache, which `cache_dir` changes, is what it was to those that follow."""
    forget_everything(monkeypatch)
    restart()
    before = {name: jax.config.values[name] for name in CACHE}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    restart()


def restart() -> None:
    """What one process made ready is not there in the next."""
    warming.forget()
    _warmup_jitted._jitted.cache_clear()


def arrays(batch: int = 16, seed: int = 0) -> dict[str, Any]:
    """A call of causal_conv1d_update as `ONE` warms it."""
    rng = np.random.default_rng(seed)
    D, floats = DIMS.heads * DIMS.headdim + 2 * DIMS.dstate, jnp.bfloat16
    shapes = {"x": (batch, D), "conv_state": (17, 3, D), "weight": (D, 4), "bias": (D,)}
    named = {name: jnp.asarray(rng.standard_normal(shape), floats) for name, shape in shapes.items()}
    return named | {"conv_state_indices": jnp.arange(batch, dtype=jnp.int32)}


def jitted() -> _warmup_jitted.Jitted:
    return pallas_ssm.jitted("causal_conv1d_update", **UPDATE)


def called() -> tuple[np.ndarray, ...]:
    """What a call returns that compiles nothing, and donates."""
    named = arrays()
    with pallas_ssm.forbid_compiles():
        results = jax.block_until_ready(jitted()(**named))
    assert named["conv_state"].is_deleted() and not named["x"].is_deleted()
    return tuple(map(np.asarray, results))


def assert_right(results: tuple[np.ndarray, ...]) -> None:
    expected = pallas_ssm.causal_conv1d_update(**arrays(), **UPDATE)
    for got, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(got, np.asarray(wanted))


def stored(folder: Path) -> list[Path]:
    return list((folder / _stored_programs.FOLDER).iterdir())


def test_what_was_stored_is_loaded_and_called(tmp_path):
    first = pallas_ssm.warmup(DIMS, cache_dir=tmp_path, **ONE)
    assert (first.variants, first.cache_hits, first.calls) == (1, 0, 1)
    assert_right(called())
    restart()
    events: list[str] = []

    def listener(event: str, duration_secs: float, **_: Any) -> None:
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        second = pallas_ssm.warmup(DIMS, cache_dir=tmp_path, **ONE)
        results = called()
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert (second.variants, second.cache_hits, second.calls) == (1, 1, 1)
    assert not [event for event in events if "/compile/" in event or "trace" in event]
    assert_right(results)


@pytest.mark.parametrize("damage", (lambda content: content[:-7], lambda content: b"", lambda content: b"\0" * 99))
def test_a_damaged_file_is_replaced(tmp_path, caplog, damage):
    pallas_ssm.warmup(DIMS, cache_dir=tmp_path, **ONE)
    (path,) = stored(tmp_path)
    whole = path.stat().st_size
    path.write_bytes(damage(path.read_bytes()))
    restart()
    summary = pallas_ssm.warmup(DIMS, cache_dir=tmp_path, **ONE)
    assert summary.variants == summary.calls == 1
    assert "a stored program is made anew" in caplog.text
    # As large as the first one, and good: what JAX's cache held would be neither.
    assert [found.stat().st_size for found in stored(tmp_path)] == [whole]
    restart()
    assert pallas_ssm.warmup(DIMS, cache_dir=tmp_path, **ONE).cache_hits == 1
    assert_right(called())


def test_a_folder_that_cannot_be_written_to_stores_nothing(tmp_path, caplog):
    (tmp_path / _stored_programs.FOLDER).write_text("in the way")
    summary = pallas_ssm.warmup(DIMS, cache_dir=tmp_path, **ONE)
    assert summary.variants == 1 and "nothing is stored" in caplog.text
    assert_right(called())


def _changed_version(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(jaxlib.version, "__version__", "0.0.1")


def _changed_flags(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")


def _changed_settings(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")


def _changed_tables(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    put_table(folder, {"8": entry(4, 2)})
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(folder))


def _changed_sources(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir()
    (folder / "selective_state_update.py").write_text("def selective_state_update(): ...")
    monkeypatch.setattr(_stored_programs, "__file__", str(folder / "_stored_programs.py"))
    _stored_programs._sources.cache_clear()


@pytest.mark.parametrize(
    "change", (_changed_version, _changed_flags, _changed_settings, _changed_tables, _changed_sources)
)
def test_other_circumstances_have_other_programs(monkeypatch, tmp_path, change):
    def digest() -> str | None:
        return _stored_programs.digest_circumstances(jax.devices()[0])

    before, precision = digest(), jax.config.jax_default_matmul_precision
    assert before is not None and before == digest()
    try:
        change(monkeypatch, tmp_path / "changed")
        assert digest() not in (None, before)
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
        monkeypatch.undo()
        _stored_programs._sources.cache_clear()
    assert digest() == before


def test_a_program_is_named_by_its_operator_options_and_arrays():
    def name(op: str, batch: int = 16, dtype: Any = jnp.bfloat16, **options: Any) -> str:
        shapes = {"x": jax.ShapeDtypeStruct((batch, 64), dtype)}
        return _stored_programs.name_of(pallas_ssm.jitted(op, **options), shapes, "here")

    names = [
        name("causal_conv1d_update"), name("causal_conv1d"), name("causal_conv1d_update", 24),
        name("causal_conv1d_update", dtype=jnp.float32), name("causal_conv1d_update", activation="silu"),
    ]  # fmt: skip
    assert len(set(names)) == 5 and name("causal_conv1d_update") == names[0]


def test_under_an_override_nothing_is_stored_or_loaded(tmp_path):
    pallas_ssm.warmup(DIMS, cache_dir=tmp_path, **ONE)
    before = stored(tmp_path)
    assert len(before) == 1
    restart()
    with pallas_ssm.override("causal_conv1d_update", BLOCK_SIZE_D=64):
        summary = pallas_ssm.warmup(DIMS, cache_dir=tmp_path, processes=2, **ONE)
        assert summary.variants == 1
        called()
    assert stored(tmp_path) == before


def test_only_calls_of_its_kind_go_to_a_program():
    function, count = jitted(), []

    def program(*values: Any) -> str:
        count.append(values)
        return "the program"

    named = arrays()
    function.keep(named, _warmup_jitted.place(jax.devices()[0]), "", program)
    assert function(**named) == "the program"
    # In the order of their names, whatever the caller's.
    assert function(**dict(reversed(named.items()))) == "the program"
    assert [value.shape for value in count[0]] == [named[name].shape for name in sorted(named)]
    positional = [named.pop(name) for name in ("x", "conv_state", "weight")]
    assert function(*positional, **named) == "the program"
    named = arrays()
    for same in (np.asarray(named["x"]), jax.device_put(named["x"], jax.devices()[0])):
        assert function(**named | {"x": same}) == "the program"
    seen = len(count)
    mesh = jax.sharding.NamedSharding(jax.make_mesh((1,), ("a",)), jax.sharding.PartitionSpec())
    for other in (
        arrays(batch=3),
        {name: jnp.ones(array.shape, {2: "float32"}.get(array.itemsize, "int32")) for name, array in arrays().items()},
        arrays() | {"bias": None},
        arrays() | {"x": jax.device_put(arrays()["x"], mesh)},
    ):
        assert function(**other) != "the program"
    precision, override = jax.default_matmul_precision("highest"), pallas_ssm.override
    contexts = (override("causal_conv1d_update", BLOCK_SIZE_D=64), precision, jax.disable_jit())
    for context in contexts:
        with context:
            assert function(**arrays()) != "the program"
    assert len(count) == seen


def test_a_weak_type_promotes_as_in_jax_jit():
    named = {"x": jnp.ones((1, 5, 8)), "weight": jnp.ones((8, 4))}
    function = pallas_ssm.jitted("causal_conv1d")
    function.keep(named, _warmup_jitted.place(jax.devices()[0]), "", lambda *_: "the program")
    assert function(**named) == "the program"
    weak = jnp.full((1, 5, 8), 1.0)
    assert weak.weak_type and function(**named | {"x": weak}) != "the program"


def test_traces_see_the_operator_itself():
    x, weight = jnp.linspace(-1, 1, 40).reshape(1, 5, 8), jnp.linspace(0, 1, 32).reshape(8, 4)
    function = pallas_ssm.jitted("causal_conv1d")
    function.keep({"x": x, "weight": weight}, _warmup_jitted.place(jax.devices()[0]), "", lambda *_: ("the program",))
    assert function(x=x, weight=weight) == ("the program",)

    def plain(x):
        return pallas_ssm.causal_conv1d(x, weight)[0].sum()

    def through(x):
        return function(x=x, weight=weight)[0].sum()

    np.testing.assert_allclose(jax.jit(through)(x), plain(x), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(through)(x), jax.grad(plain)(x), rtol=1e-6)
    rows = jnp.stack([x, 2 * x])
    np.testing.assert_allclose(jax.vmap(through)(rows), [plain(x), plain(2 * x)], rtol=1e-6)
    # Arrays and not tracers, but inside of a trace.
    np.testing.assert_allclose(jax.jit(lambda: through(x))(), plain(x), rtol=1e-6)


def test_a_jitted_operator_is_used_like_the_function_it_wraps():
    function = jitted()
    assert inspect.unwrap(function) is pallas_ssm.causal_conv1d_update
    assert function.__doc__ == pallas_ssm.causal_conv1d_update.__doc__
    named = arrays()
    lowered = function.lower(named.pop("x"), **named)
    assert "jit_causal_conv1d_update" in lowered.as_text() and lowered.compile().args_info is not None
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'weight'"):
        pallas_ssm.jitted("causal_conv1d")(x=jnp.ones((1, 5, 8)))
    with pytest.raises(TypeError, match="'sigma'"):
        pallas_ssm.jitted("causal_conv1d")(x=jnp.ones((1, 5, 8)), sigma=jnp.ones(3))


def test_a_setting_that_came_with_a_module_makes_no_other_program(monkeypatch):
    """Pallas registers some when its parts are imported, which one process has done and another has not."""
    before = _stored_programs.digest_circumstances(jax.devices()[0])
    names, context = _stored_programs.trace_context_names(), _stored_programs.trace_context()
    monkeypatch.setattr(_stored_programs, "trace_context_names", lambda: (*names, "a_new_one"))
    monkeypatch.setattr(_stored_programs, "trace_context", lambda: (*context, False))
    assert _stored_programs.digest_circumstances(jax.devices()[0]) == before is not None
    monkeypatch.setattr(_stored_programs, "trace_context", lambda: (*context, True))
    assert _stored_programs.digest_circumstances(jax.devices()[0]) not in (None, before)
