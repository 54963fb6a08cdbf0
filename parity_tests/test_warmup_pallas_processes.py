"""`pallas_ssm.warmup` with processes of its own: what they compile, and what becomes of it when they fail."""

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import IO, Any

import jax
import numpy as np
import pytest

import pallas_ssm
import ssm_configs
from pallas_ssm import _warmup_farm, _warmup_jitted, _warmup_programs, _warmup_ready
from ssm_configs.model_dims import ModelDims
from ssm_configs.models import warming

from .configs_env import forget_everything

DIMS = ModelDims(heads=2, groups=1, headdim=16, dstate=16, chunk_size=16)
TWO: dict[str, Any] = {
    "ops": ["causal_conv1d_update", "selective_state_update"], "max_tokens": 16, "max_batch": 16, "progress": False
}  # fmt: skip
_COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_everything(monkeypatch)
    warming.forget()
    _warmup_jitted._jitted.cache_clear()


def assert_ready() -> None:
    """The programs are called without a compile, and do what `jax.jit` of the operators does."""
    request = _warmup_programs.Request(
        DIMS, 16, 16, tuple(TWO["ops"]), ("packed", "dense"), ("split",), (1,), 17, 0, None
    )  # fmt: skip
    for _, function, shapes in _warmup_programs.make_programs(request):
        arrays = {name: np.ones(shape.shape, shape.dtype) for name, shape in shapes.items()}
        with pallas_ssm.forbid_compiles():
            results = jax.block_until_ready(function(**arrays))
        operator = getattr(pallas_ssm, function.op)
        expected = jax.jit(
            lambda arrays, operator=operator, function=function: operator(**arrays, **dict(function.options))
        )
        for got, wanted in zip(results, expected(arrays), strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


def test_processes_compile_and_this_one_loads():
    events: list[str] = []

    def listener(event: str, duration_secs: float, **_: Any) -> None:
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        with jax.default_matmul_precision("highest"):  # which they have to be told
            summary = pallas_ssm.warmup(DIMS, processes=2, **TWO)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert (summary.variants, summary.cache_hits, summary.calls) == (2, 0, 2)
    assert _COMPILED not in events
    with jax.default_matmul_precision("highest"):
        assert_ready()


def pretend(monkeypatch: pytest.MonkeyPatch, program: str) -> list[subprocess.Popen]:
    """Processes that run `program` instead; those that were started."""
    started: list[subprocess.Popen] = []

    def start(errors: IO[bytes]) -> subprocess.Popen:
        command = [sys.executable, "-S", "-c", program]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors))
        return started[-1]

    monkeypatch.setattr(_warmup_farm, "_start", start)
    return started


_DIES = (
    "import os, sys; sys.stdin.buffer.read(1); print('the device is gone', file=sys.stderr, flush=True); os._exit(7)"
)
_REFUSES = """
import pickle, sys, json
sys.stdin.buffer.read(1)
while True: print('{"error": "out of memory", "warnings": ["no table"]}', flush=True)
"""
_TALKS = "print('hello', flush=True); import sys; sys.stdin.buffer.read()"


@pytest.mark.parametrize(
    ("program", "said"), ((_DIES, "the device is gone"), (_REFUSES, "out of memory"), (_TALKS, "JSONDecodeError"))
)
def test_what_processes_fail_to_compile_this_one_does(monkeypatch, caplog, recwarn, program, said):
    started = pretend(monkeypatch, program)
    summary = pallas_ssm.warmup(DIMS, processes=2, **TWO)
    assert summary.variants == summary.calls == 2
    assert "2 of 2 programs are compiled in this process" in caplog.text and said in caplog.text
    assert len(started) == 2 and all(child.poll() is not None for child in started)
    missing = [warning for warning in recwarn if issubclass(warning.category, ssm_configs.TableWarning)]
    assert [str(warning.message) for warning in missing] == ["no table"] * (program is _REFUSES)
    assert_ready()


@pytest.mark.parametrize(
    ("platform", "gpus", "GiB", "cores", "asked", "programs", "expected"),
    (
        ("gpu", 1, 104, 16, None, 113, 13), ("gpu", 1, 60, 16, None, 113, 7), ("gpu", 1, 104, 4, None, 113, 3),
        ("gpu", 1, 104, 1, None, 113, 1), ("gpu", 1, 104, 16, None, 11, 1), ("gpu", 1, 104, 16, None, 12, 2),
        ("gpu", 8, 104, 16, None, 113, 1), ("cpu", 1, None, 16, None, 113, 1), ("gpu", 1, None, 16, None, 113, 1),
        ("gpu", 1, 104, 16, 1, 113, 1), ("gpu", 8, 104, 4, 12, 113, 12), ("gpu", 1, 104, 16, 12, 0, 1),
    ),
)  # fmt: skip
def test_how_many_processes_there_are(monkeypatch, platform, gpus, GiB, cores, asked, programs, expected):
    monkeypatch.setattr(jax, "local_device_count", lambda: gpus)
    monkeypatch.setattr(_warmup_ready, "_cores", lambda: cores)
    memory = None if GiB is None else {"bytes_limit": GiB << 30}
    how: Any = SimpleNamespace(device=SimpleNamespace(platform=platform, memory_stats=lambda: memory), processes=asked)
    assert _warmup_ready._processes(how, programs) == expected


def test_a_process_that_cannot_be_started(monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert pallas_ssm.warmup(DIMS, processes=2, **TWO).variants == 2
    assert "a process could not be started" in caplog.text
    assert_ready()


def test_an_interrupt_ends_the_processes(monkeypatch):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals go to the main thread")
    started = pretend(monkeypatch, "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)")
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pallas_ssm.warmup(DIMS, processes=2, **TWO)
    assert len(started) == 2 and all(child.poll() is not None for child in started)


def test_a_program_that_nobody_can_compile_is_named(monkeypatch):
    pretend(monkeypatch, _DIES)
    with pytest.raises(
        RuntimeError, match=r"warmup: causal_conv1d_update, 16 sequences of 1: .* does not run on a CPU"
    ):
        pallas_ssm.warmup(DIMS, processes=2, implementation="mosaic_gpu", **TWO)


def test_another_program_than_the_one_asked_for_is_refused(tmp_path):
    """As when settings or sources changed on the way."""
    from pallas_ssm import _warmup_child
    from pallas_ssm._stored_programs import Store

    request = ("a name", "causal_conv1d", {}, {"x": ((1, 5, 8), "float32"), "weight": ((8, 4), "float32")})
    answer = _warmup_child._answer(Store(tmp_path), "here", request)
    assert answer == {"error": "RuntimeError: this process would make another program", "warnings": []}
    assert not Store(tmp_path).holds("a name")
