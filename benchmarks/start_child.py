"""One first call in a process of its own: `python -m benchmarks.start_child OP IMPLEMENTATION`, run by `benchmarks start`.

Prints one JSON object: seconds to import the package, seconds from the first call to its result, and how many kernels or
programs were compiled meanwhile (those that a cache on disk held are not counted). What any program has to do once (a CUDA
context, JAX's client, operands) is done before the clock starts.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any


def measure(op_name: str, name: str) -> dict[str, float | int]:
    start = time.perf_counter()
    module = importlib.import_module(package(op_name, name))
    imported = time.perf_counter() - start

    import torch

    from .implementations import OWN, JaxOperands, TorchOperands, of_peer
    from .op import Storage, draw
    from .ops import OPS
    from .start_command import case_of
    from .timing import synchronize

    op, case = OPS[op_name], case_of(OPS[op_name])
    # Without a GPU only tests come here.
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if name in OWN:
        implementation = OWN[name](device)
    else:
        peer = next(peer for peer in op.peers if peer.implementation == name)
        implementation = of_peer(device, peer, getattr(module, peer.function))
    storage = Storage(device)
    initial = draw(op, case, storage)
    on_jax = implementation.framework == "jax"
    operands: Any = JaxOperands(op, initial) if on_jax else TorchOperands(op, case, initial, storage)
    synchronize()
    counts = _count_jax() if on_jax else _count_triton()

    start = time.perf_counter()
    # In JAX this compiles; a call of torch's does that on its way.
    compiled: Any = implementation.compile(op, case, None) if on_jax else None
    call = implementation.bind(op, operands, compiled, None)
    call.issue()
    call.wait()
    return {"import": imported, "first": time.perf_counter() - start, "compiles": counts()}


def package(op_name: str, name: str) -> str:
    """What a user of this implementation imports."""
    if name == "triton":
        return "triton_ssm"
    if not name.startswith("peer:"):
        return "pallas_ssm"
    from .ops import OPS

    return next(peer.module for peer in OPS[op_name].peers if peer.implementation == name)


def _count_triton() -> Callable[[], int]:
    from triton import knobs

    compiled = []

    def listen(**about: Any) -> None:
        if not about["cache_hit"]:
            compiled.append(about)

    knobs.compilation.listener = listen
    return lambda: len(compiled)


def _count_jax() -> Callable[[], int]:
    from jax import monitoring

    events: list[str] = []
    monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **details: events.append(event))
    monitoring.register_event_listener(lambda event, **details: events.append(event))
    compiled, hit = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
    return lambda: events.count(compiled) - events.count(hit)


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
