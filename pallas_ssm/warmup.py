"""Compiles before the first request what serving and training forward will ask for, so that no request waits for a compiler.

JAX compiles whole programs, a model's jitted steps and not the operators in them, so those are what a server has to name:

    summary = warmup(dims, max_tokens=8192, max_batch=256, ops=(), programs=[
        (decode_step, (parameter_shapes, pool_shapes, batch_shapes(n))) for n in buckets(256)
    ])
    with forbid_compiles():
        ...
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax import monitoring

from ssm_configs import override_token
from ssm_configs.models import warming
from ssm_configs.models.warming import Job, Summary
from ssm_configs.search import SSM_FOLDER, VLLM_FOLDER

from ._selective_state_update_dispatch import IMPLEMENTATIONS
from ._stored_programs import digest_circumstances
from ._warmup_jitted import jitted as jitted
from ._warmup_jitted import place
from ._warmup_programs import Program, Request, make_programs
from ._warmup_programs import buckets as buckets
from ._warmup_ready import TITLE, How, make_ready

_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


def warmup(
    model: Any,
    *,
    max_tokens: int,
    max_batch: int,
    ops: Iterable[str] | None = None,
    forms: Iterable[str] = ("packed", "dense"),
    entries: Iterable[str] = ("split",),
    sequences: Iterable[int] = (1,),
    slots: int | None = None,
    speculative: int = 0,
    implementation: str | None = None,
    programs: Iterable[tuple[Callable[..., Any], tuple[Any, ...]]] = (),
    processes: int | None = None,
    threads: int | None = None,
    progress: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> Summary:
    """Compiles the operators as `jitted` gives them, at every bucket of tokens and sequences, and the `programs` it is given.

    What it made ready, a later call of the same jitted function finds without a trace. With `cache_dir` compiled operators are
    stored there, and another process loads them. `programs` are traced by every process anew, and then found in JAX's cache. An
    operator inside of another jitted function is part of that program and compiled with it, which only `programs` can do ahead.
    Nothing runs, and no array is allocated. Once per process: an equal call later returns the same summary, `cached=True`; a
    call with `programs` always looks at them.

    Args:
        model: a `ModelDims`, a Hugging Face config that `ModelDims.from_config` reads, or None: nothing to warm.
        max_tokens: the most tokens of one prefill call, over all its sequences.
        max_batch: the most sequences of one decode call.
        ops: names of operators; by default those that the model's layers call; () for none.
        forms: how prefill is called:
            "packed": cu_seqlens, and a pool for the states of the convolution (the scan takes and returns arrays);
            "packed_states": cu_seqlens, and all states as arrays;
            "dense": one row without states, as in training forward;
            "dense_states": one row with states as arrays.
            All but "dense" are compiled with and without states to start from.
        entries: how a layer takes its convolution apart: "split" (`causal_conv1d_split`), "plain" (`causal_conv1d`), "aligned"
            (`causal_conv1d_split` with chunk_size, and chunk_aligned=True).
        sequences: the numbers of sequences that prefill batches are padded to (by bounds that repeat).
        slots: of the pools; max_batch + 1 by default.
        speculative: tokens drafted for each sequence and step; the pool of conv states has so many rows more. 0 for none.
        implementation: as for the operators.
        programs: (jitted function, its positional arguments as arrays or `jax.ShapeDtypeStruct`s), to be compiled as well.
        processes: that compile operators. Each takes the memory of a CUDA context (some 500 MiB of the device) until `warmup`
            returns; what they fail to compile, this one does. 1 is this one alone, as always under an override and by default
            on a CPU, with more than one GPU, and for a few programs; else there are fewer than cores, and at most as many as
            take a sixteenth of the memory.
        threads: that load, and in this process compile, at a time; by default one a core, 16 at most. Tracing stays in the
            caller's thread.
        progress: whether to show a bar (where tqdm is installed).
        cache_dir: a folder where compiled operators are stored. From now on it is JAX's compilation cache as well, for the
            whole process, and its thresholds such that it keeps every program; by default that is as it was, and nothing is
            stored. Whoever can write there can run code in this process.

    Raises:
        ValueError, TypeError: before anything is compiled.
        RuntimeError: a program failed to compile; it says which.
    """
    dims = warming.model_dims(model)
    warming.check_sizes(max_tokens, max_batch, speculative)
    forms = warming.check_names("forms", forms, warming.FORMS)
    entries = warming.check_names("entries", entries, warming.ENTRIES)
    threads = warming.thread_count(threads)
    if processes is not None:
        (processes,) = _counts("processes", [processes])
    sequences = _counts("sequences", sequences)
    (slots,) = _counts("slots", [max_batch + 1 if slots is None else slots])
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {IMPLEMENTATIONS} or None, got {implementation!r}")
    programs = list(_checked(programs))
    jobs = [_job(f"programs[{index}]", *program) for index, program in enumerate(programs)]
    if dims is None and not jobs:
        return warming.nothing("pallas_ssm")
    if cache_dir is not None:
        _keep_programs(cache_dir)
    device = _device()
    circumstances = digest_circumstances(device)
    how = How(device, circumstances, place(device), cache_dir, processes, threads, progress)
    if dims is None:
        return _warm("", jobs, [], how)
    ops = warming.operators(dims) if ops is None else warming.check_names("ops", ops, warming.operators(dims))
    request = Request(
        dims, max_tokens, max_batch, ops, forms, entries, sequences, slots, speculative, implementation
    )  # fmt: skip
    if programs:
        return _warm(dims.model, jobs, list(make_programs(request)), how)
    # Whatever may lead to another table, device or program.
    folders = os.environ.get(SSM_FOLDER), os.environ.get(VLLM_FOLDER)
    key = ("pallas_ssm", request, str(device), *folders, override_token(), circumstances)
    return warming.once(key, lambda: _warm(dims.model, [], list(make_programs(request)), how))


def _job(name: str, function: Any, arguments: tuple[Any, ...], named: Any = None) -> Job:
    # Traced where the caller's contexts hold (overrides, a default device): they are part of what a call is found by.
    return Job(name, lambda lowered: lowered.compile(), lambda: function.lower(*arguments, **(named or {})))


def _remember(job: Job) -> None:
    """JAX keeps its last 2,048 traces, and a program with kernels takes dozens: the first one's may have been given up for
    those within the others. Asking once more finds what was compiled, and makes it the last to be given up."""
    job.run(*(() if job.prepare is None else (job.prepare(),)))


def _warm(model: str, jobs: list[Job], operators: list[Program], how: How) -> Summary:
    """`jobs` are the caller's own programs."""
    before = _peak(how.device)
    calls = len(jobs) + len(operators)
    start = time.perf_counter()
    if how.circumstances is None:
        # They are found through JAX's traces, which know the circumstances.
        jobs = jobs + [_job(name, function, (), shapes) for name, function, shapes in operators]
        operators = []
    with _counted() as counts:
        ready = make_ready(operators, how)
        warming.run_jobs([*jobs, *ready.jobs], how.threads, how.progress, TITLE)
        for job in jobs:
            _remember(job)
    seconds = time.perf_counter() - start
    after = _peak(how.device)
    peak = None if before is None or after is None else after - before
    variants = counts[_COMPILED] + ready.held + ready.apart
    return Summary("pallas_ssm", model, variants, counts[_CACHE_HIT] + ready.held, calls, seconds, peak)


def _device() -> Any:
    """Where calls run by default."""
    device = jax.config.jax_default_device
    return jax.devices(device)[0] if device is None or isinstance(device, str) else device


def _peak(device: Any) -> int | None:
    """This process's peak on the device so far. A warm-up has raised it only if XLA measures alternatives."""
    stats = device.memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """How many programs JAX's compiler is asked for meanwhile, and how many of them a cache on disk had."""
    counts: dict[str, int] = dict.fromkeys((_COMPILED, _CACHE_HIT), 0)
    lock = threading.Lock()

    def count(event: str, *_: Any, **details: Any) -> None:
        if event in counts:
            with lock:
                counts[event] += 1

    monitoring.register_event_duration_secs_listener(count)
    monitoring.register_event_listener(count)
    try:
        yield counts
    finally:
        monitoring.unregister_event_duration_listener(count)
        monitoring.unregister_event_listener(count)


def _keep_programs(folder: str | os.PathLike) -> None:
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    # By default programs are kept only if they took a second or more, which few of these do.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # After the first compile of a process JAX no longer asks whether there is a cache.
    compilation_cache.reset_cache()


def _counts(argument: str, values: Iterable[Any]) -> tuple[int, ...]:
    if not isinstance(values, Iterable):
        raise TypeError(f"{argument}: expected a sequence of ints, got {type(values).__name__}")
    values = tuple(values)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{argument}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{argument}: expected at least 1, got {value}")
    return values


def _checked(programs: Iterable[Any]) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    for index, program in enumerate(programs):
        if not isinstance(program, tuple) or len(program) != 2 or not isinstance(program[1], tuple):
            raise TypeError(f"programs[{index}]: expected (jitted function, tuple of arguments), got {program!r:.100}")
        if not hasattr(program[0], "lower"):
            raise TypeError(f"programs[{index}]: expected a function from jax.jit, got {type(program[0]).__name__}")
        yield program
