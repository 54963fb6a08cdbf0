"""What both packages' `warmup` have in common: jobs in threads, a bar, a summary, and doing it once."""

import contextlib
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..model_dims import ModelDims

FORMS = ("packed", "packed_states", "dense", "dense_states")
ENTRIES = ("split", "plain", "aligned")

_MOST_THREADS = 16

_log = logging.getLogger("ssm_configs.warmup")


class Job(NamedTuple):
    """Something to compile. `name` tells people which."""

    name: str
    run: Callable[..., Any]
    """In any thread; given what `prepare` returned, if there is one."""
    prepare: Callable[[], Any] | None = None
    """In the caller's thread, whose contexts it sees."""


@dataclass(frozen=True)
class Summary:
    """What a warm-up did; `str()` prints it."""

    package: str
    model: str
    variants: int = 0
    """Kernels (Triton) or programs (JAX) that were made ready."""
    cache_hits: int = 0
    """Those among them that a cache on disk held."""
    calls: int = 0
    """Calls that were made, or lowered, to reach them."""
    seconds: float = 0.0
    peak_bytes: int | None = None
    """The most device memory that it held at a time; None where nobody counted."""
    cached: bool = False
    """Whether this is an earlier warm-up's summary: nothing was left to do."""

    def __str__(self) -> str:
        if not self.calls:
            return f"{self.package}: nothing to warm up"
        peak = "" if self.peak_bytes is None else f", {self.peak_bytes / 2**20:.0f} MiB at most"
        before = " (done before)" if self.cached else ""
        return (
            f"{self.package}: {self.model or 'model'} warm{before}: {self.variants} variants by {self.calls} calls in "
            f"{self.seconds:.1f} s, {self.cache_hits} from the cache on disk{peak}"
        )


def model_dims(model: Any) -> ModelDims | None:
    """`model` as dims: as they are, read from a config, or None where there is nothing to warm."""
    return model if isinstance(model, ModelDims) else ModelDims.from_config(model)


def check_sizes(max_tokens: Any, max_batch: Any, speculative: Any) -> None:
    for name, value, least in (
        ("max_tokens", max_tokens, 1),
        ("max_batch", max_batch, 1),
        ("speculative", speculative, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def thread_count(threads: Any) -> int:
    """`threads`, or one a core up to 16: more wait for each other, as compilers hold Python's lock part of the time."""
    if threads is None:
        return min(os.cpu_count() or 1, _MOST_THREADS)
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads: expected an int or None, got {type(threads).__name__}")
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    return threads


def check_names(argument: str, names: Iterable[str], legal: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"{argument}: expected a sequence of names, got the str {names!r}")
    names = tuple(names)
    for name in names:
        if name not in legal:
            raise ValueError(f"{argument}: expected some of {tuple(legal)}, got {name!r}")
    return names


def operators(dims: ModelDims) -> tuple[str, ...]:
    """Those that the model's layers call."""
    mamba = ("mamba_chunk_scan_combined", "selective_state_update") if dims.has_mamba else ()
    gdn = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule") if dims.has_gdn else ()
    return ("causal_conv1d", "causal_conv1d_update", *mamba, *gdn)


_done: dict[Hashable, Summary] = {}
_done_lock = threading.RLock()
_said: set[str] = set()


def once(key: Hashable, warm: Callable[[], Summary]) -> Summary:
    """`warm()`, or what it returned for an equal key before. One at a time: a second caller waits for the first."""
    with _done_lock:
        if key in _done:
            return replace(_done[key], cached=True)
        _done[key] = warm()
        return _done[key]


def forget() -> None:
    """Do it again when it is next asked for."""
    with _done_lock:
        _done.clear()
        _said.clear()


def nothing(package: str) -> Summary:
    """Says once per process that there is nothing to warm."""
    with _done_lock:
        if package not in _said:
            _said.add(package)
            _log.warning("%s.warmup: no model config, or one without state-space layers: nothing is warmed up", package)
    return Summary(package, "")


def run_jobs(jobs: Sequence[Job], threads: int, progress: bool, title: str) -> float:
    """Runs them all; seconds. The first error, by the job's name, is raised once all have ended."""
    errors: list[tuple[Job, Exception]] = []
    start = time.perf_counter()
    with bar(len(jobs), progress, title) as advance, ThreadPoolExecutor(max_workers=threads) as pool:

        def attempt(job: Job, prepared: tuple[Any, ...]) -> None:
            try:
                job.run(*prepared)
            except Exception as error:
                errors.append((job, error))
            advance()

        for index, job in enumerate(jobs):
            try:
                prepared = () if job.prepare is None else (job.prepare(),)
            except Exception as error:
                errors.append((job, error))
                continue
            # The first one alone: it initialises compilers and drivers, not all of which would stand being raced.
            if index and threads > 1:
                pool.submit(attempt, job, prepared)
            else:
                attempt(job, prepared)
    if errors:
        job, error = errors[0]
        raise RuntimeError(
            f"warmup: {job.name}: {type(error).__name__}: {error} ({len(errors)} of {len(jobs)} calls failed)"
        ) from error
    return time.perf_counter() - start


@contextlib.contextmanager
def bar(total: int, progress: bool, title: str) -> Iterator[Callable[[], object]]:
    """Called as things get done. tqdm's where it is installed."""
    tqdm = None
    if progress and total:
        with contextlib.suppress(ImportError):
            tqdm = importlib.import_module("tqdm").tqdm
    if tqdm is None:
        yield lambda: None
        return
    with tqdm(total=total, desc=title, unit="call", leave=False) as shown:
        yield shown.update
