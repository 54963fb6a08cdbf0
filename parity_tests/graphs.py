"""CUDA graphs in a process that may hold JAX as well."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def capture() -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of what torch launches within."""
    graph = torch.cuda.CUDAGraph()
    # What JAX's threads do meanwhile is none of the capture's business.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        yield graph
