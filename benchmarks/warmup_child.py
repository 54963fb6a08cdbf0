"""One warm-up in a process of its own: `python -m benchmarks.warmup_child warmup IMPLEMENTATION`, run by `benchmarks start`.

Prints what `start_child` prints, the warm-up being the first call. Its caches are where the environment says.
"""

import importlib
import json
import os
import sys
import time
from typing import Any

# What a server of this model would warm: all its layers, prefill and decode.
MODEL, MAX_TOKENS, MAX_BATCH = "Nemotron-H-8B", 8192, 256
CASE = f"{MODEL}, {MAX_TOKENS} tokens, {MAX_BATCH} sequences"

PACKAGES = {"triton": "triton_ssm", "mosaic_gpu": "pallas_ssm"}


def measure(
    implementation: str, max_tokens: int = MAX_TOKENS, max_batch: int = MAX_BATCH, **dims: int
) -> dict[str, Any]:
    """`dims`: in place of the model's."""
    start = time.perf_counter()
    package = importlib.import_module(PACKAGES[implementation])
    imported = time.perf_counter() - start
    options: dict[str, Any] = {}
    # A CUDA context or JAX's client are not the warm-up's.
    if implementation == "triton":
        import torch

        torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    else:
        import jax

        jax.devices()
        options["cache_dir"] = os.environ["JAX_COMPILATION_CACHE_DIR"]
    model: Any = package.ModelDims(**(dims or _dims()), model=MODEL)
    start = time.perf_counter()
    summary = package.warmup(model, max_tokens=max_tokens, max_batch=max_batch, progress=False, **options)
    seconds = time.perf_counter() - start
    return {"import": imported, "first": seconds, "compiles": summary.variants - summary.cache_hits}


def _dims() -> dict[str, int]:
    from parity_tests.cases import MAMBA2_MODELS

    model = next(model for model in MAMBA2_MODELS if model.name == MODEL)
    names = ("heads", "groups", "headdim", "dstate", "chunk_size")
    return dict(zip(names, (model.H, model.G, model.P, model.N, model.chunk_size), strict=True))


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[2])))
