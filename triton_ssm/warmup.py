"""Compiles before the first request what serving and training forward will ask for, so that no request waits for a compiler.

summary = warmup(ModelDims.from_config(config).slice(tp), max_tokens=8192, max_batch=256)
with forbid_compiles():
    ...
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from triton import knobs

from ssm_configs import override_token
from ssm_configs.contracts.ssd import check_flag
from ssm_configs.models import warming
from ssm_configs.models.warming import Job, Summary
from ssm_configs.search import SSM_FOLDER, VLLM_FOLDER

from ._device import tuning_device
from ._native import native


def warmup(
    model: Any,
    *,
    max_tokens: int,
    max_batch: int,
    ops: Iterable[str] | None = None,
    forms: Iterable[str] = ("packed", "dense"),
    entries: Iterable[str] = ("split",),
    speculative: int = 0,
    stochastic_rounding: bool = False,
    sliced: bool = False,
    device: torch.device | str | None = None,
    threads: int | None = None,
    progress: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> Summary:
    """Compiles and loads every kernel variant that calls up to these sizes reach. Once per process: an equal call later returns
    the same summary, `cached=True`.

    Needs a few slots of state and a few hundred tokens of memory, for each thread (a few thousand for a gated delta rule of few
    heads, a few dozen MiB), and gives it back: call it before caches are allocated. It resets torch's peak-memory counter of
    the device. Random states of the process stay as they are.

    Args:
        model: a `ModelDims`, a Hugging Face config that `ModelDims.from_config` reads, or None: nothing to warm.
        max_tokens: the most tokens of one prefill call, over all its sequences.
        max_batch: the most sequences of one call.
        ops: names of operators; by default those that the model's layers call.
        forms: how prefill is called:
            "packed": cu_seqlens, and pools for the states before and after (state_indices, final_states_out);
            "packed_states": cu_seqlens, and the states as tensors (initial_state(s), return_final_state(s));
            "dense": neither, as in training forward;
            "dense_states": batch rows with states as tensors.
            All but "dense" are warmed with and without states to start from.
        entries: how a layer takes its convolution apart: "split" (`causal_conv1d_split`), "plain" (views of `causal_conv1d`'s
            output), "aligned" (`causal_conv1d_split` with chunk_size, and chunk_aligned=True).
        speculative: tokens drafted for each sequence and step; the pool of conv states has so many rows more. 0 for none.
        stochastic_rounding: whether decode gets a rounding_seed.
        sliced: whether calls get slices of a mixed batch's tensors, which may begin at any address. Takes several times as
            many variants; without it every tensor must begin at a multiple of 16 bytes, as all new tensors do.
        device: the current CUDA device by default, or the CPU under Triton's interpreter.
        threads: that compile at a time; by default one a core, 16 at most.
        progress: whether to show a bar (where tqdm is installed).
        cache_dir: where Triton keeps compiled kernels from now on, for the whole process; by default as it was.

    Raises:
        ValueError, TypeError: before anything is compiled.
        RuntimeError: a call failed; it says which.
    """
    # Only here: it brings in the scan's fused path, which many a process never needs.
    from ._warmup_jobs import Request, make_jobs

    dims = warming.model_dims(model)
    warming.check_sizes(max_tokens, max_batch, speculative)
    forms = warming.check_names("forms", forms, warming.FORMS)
    entries = warming.check_names("entries", entries, warming.ENTRIES)
    threads = warming.thread_count(threads)
    check_flag("sliced", sliced)
    check_flag("stochastic_rounding", stochastic_rounding)
    if dims is None:
        return warming.nothing("triton_ssm")
    ops = warming.operators(dims) if ops is None else warming.check_names("ops", ops, warming.operators(dims))
    if stochastic_rounding and dims.state_dtype == "float32":
        raise ValueError("stochastic_rounding: expected a 16-bit state_dtype, got float32")
    where = _device(device)
    if cache_dir is not None:
        knobs.cache.dir = os.fspath(cache_dir)
    request = Request(
        dims, where, tuning_device(where), max_tokens, max_batch, ops, forms, entries, speculative, stochastic_rounding, sliced
    )  # fmt: skip
    # Whatever may lead to another table may lead to other variants.
    key = ("triton_ssm", request, os.environ.get(SSM_FOLDER), os.environ.get(VLLM_FOLDER), override_token())
    return warming.once(key, lambda: _warm(dims.model, make_jobs(request), where, threads, progress))


def _warm(model: str, jobs: Sequence[Job], device: torch.device, threads: int, progress: bool) -> Summary:
    interpreted = knobs.runtime.interpret
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with _counted() as found:
        # Triton's interpreter stands one thread only.
        seconds = warming.run_jobs(jobs, 1 if interpreted else threads, progress, "triton_ssm.warmup")
    peak = None
    if on_gpu:
        native()  # or the first calls of a kind would be replayed in Python, until it is built
        peak = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.empty_cache()
    return Summary("triton_ssm", model, len(found), sum(found.values()), len(jobs), seconds, peak)


@contextmanager
def _counted() -> Iterator[dict[str, bool]]:
    """For every kernel that Triton compiles or loads meanwhile, whether its cache held it. Who listened before still does.

    By the kernel's hash: two threads may come to the same variant at once.
    """
    found: dict[str, bool] = {}
    before = knobs.compilation.listener

    def listen(**compiled: Any) -> None:
        name = compiled["metadata"]["hash"]
        found[name] = found.get(name, True) and bool(compiled["cache_hit"])
        if before is not None:
            before(**compiled)

    knobs.compilation.listener = listen
    try:
        yield found
    finally:
        knobs.compilation.listener = before


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cpu" if knobs.runtime.interpret else "cuda"
    found = torch.device(device)
    if found.type == "cpu" and not knobs.runtime.interpret:
        raise ValueError(
            "device: expected a GPU (or the CPU with TRITON_INTERPRET=1 set before triton is imported), got cpu"
        )
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: expected a GPU that torch can use, got {found}")
        found = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    return found
