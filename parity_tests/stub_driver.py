"""A process in which kernels compile for Hopper and their launches are noted, on a machine without a GPU.

Everything is Triton's own but what talks to CUDA: the driver's functions (`stub_cuda.py` has those that are called from C) and
the C launchers it would build. Tensors are the CPU's. For a process of its own, without TRITON_INTERPRET: after `install()`
nothing can run.

    python -m parity_tests.stub_driver [NAME]

prints the host time of one call of every operator in microseconds, CUDA's own part (launches, allocations) apart; with a NAME
also where the calls of that operator spend it.
"""

import functools
import itertools
import struct
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from .stub_cuda import StubCuda

STREAM = 0x57


class PyCUtensorMap:
    """What `fill_tma_descriptor` was asked."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


@dataclass
class Utils:
    functions: Iterator[int] = field(default_factory=lambda: itertools.count(0x1000))
    filled: int = 0
    built: Any = field(default_factory=threading.local)
    """The signature of the launcher that a thread made last, which is that of the kernel that it loads next."""
    signatures: dict[int, Any] = field(default_factory=dict)

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        function = next(self.functions)
        self.signatures[function] = self.built.signature
        return object(), function, 32, 0, 1024

    def make_launcher(self, constants: Any, signature: dict[Any, Any], tensordesc_meta: Any) -> str:
        self.built.signature = [part for type_ in signature.values() for part in _expanded(type_)]
        return ""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

    def fill_tma_descriptor(self, *arguments: Any) -> PyCUtensorMap:
        self.filled += 1
        return PyCUtensorMap(*arguments)


@dataclass
class StubDriver:
    """The parts of `CudaDriver` that compiling and launching use."""

    utils: Utils = field(default_factory=Utils)
    launches: list[tuple] | None = None
    """What the C launchers, or libcuda itself, were handed, while it is a list."""
    native: bool = True
    """Whether calls are replayed in C."""
    timed: bool = False
    """Whether launches from C are not even noted."""
    cuda: StubCuda = field(init=False)
    device: int = 0
    launcher_cls: Any = nvidia.CudaLauncher

    def __post_init__(self) -> None:
        self.cuda = StubCuda(self)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, index: int | None) -> int:
        return STREAM

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True

    def launch(self, *arguments: Any) -> None:
        if self.launches is None:
            return
        head, own, types_ = arguments[:13], arguments[13:], self.utils.signatures[arguments[4]]
        assert len(own) == len(types_)
        self.launches.append(
            (*head, *(_held(*pair) for pair in zip(types_, own, strict=True) if pair[0] != "constexpr"))
        )


def _expanded(type_: str) -> list[str]:
    """A descriptor is a tensor map, then its shape and its strides."""
    if not type_.startswith("tensordesc"):
        return [type_]
    rank = type_.split("[")[1].split("]")[0].count(",") + 1
    return ["map", *["i32"] * rank, *["i64"] * rank]


def _held(type_: str, argument: Any) -> Any:
    """What of an argument reaches a kernel."""
    if type_[0] == "*":
        return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument or 0
    return struct.unpack("f", struct.pack("f", argument))[0] if type_ == "fp32" else argument


@functools.cache
def install() -> StubDriver:
    driver = StubDriver()
    triton.runtime.driver.set_active(driver)  # type: ignore[arg-type]
    nvidia.PyCUtensorMap = PyCUtensorMap
    nvidia.library_dirs = lambda: []
    nvidia.make_launcher = driver.utils.make_launcher
    nvidia.compile_module_from_src = lambda **source: types.SimpleNamespace(launch=driver.launch)

    from triton_ssm import _arguments, _device, _native, _replay
    from triton_ssm.ssd import _fused_gluon

    # The CPU's tensors stand for a Hopper's, into which nobody looks.
    _arguments.check_slots_on_host = _arguments.check_bounds_on_host = lambda *arguments: None
    _replay.SERVED = ("cpu",)
    _native.entry_points = lambda: driver.cuda.entry_points() if driver.native else None
    _native.bytes_of_map = driver.cuda.bytes_of_map
    assert _native.native() is not None, "no C compiler?"
    _device.tuning_device.__code__ = (lambda device: INTERPRETED_DEVICE).__code__  # type: ignore[name-defined] # noqa: F821
    _fused_gluon.serves = lambda dims, dtype, device: (dims.P, dims.N) in _fused_gluon._SHAPES and dtype in (
        torch.bfloat16, torch.float16,
    )  # fmt: skip
    return driver


def calls() -> dict[str, Callable[[], Any]]:
    """One call of every operator, small."""
    import triton_ssm
    from triton_ssm import gdn, ssd

    bf16 = torch.bfloat16
    B, H, P, N, T = 8, 8, 64, 128, 128
    pool, A, D, bias = torch.randn(16, H, P, N), -torch.rand(H) - 1, torch.ones(H), torch.randn(H)
    x, dt, B_, C = (torch.randn(B, *shape, dtype=bf16) for shape in ((H, P), (H,), (1, N), (1, N)))
    slots = torch.arange(B, dtype=torch.int32)
    conv_x, conv_pool = torch.randn(B, 512, dtype=bf16), torch.randn(16, 3, 512, dtype=bf16)
    weight, prompt = torch.randn(512, 4, dtype=bf16), torch.randn(1, 64, 512, dtype=bf16)
    X, DT, Bs, Cs = (torch.randn(1, T, *shape, dtype=bf16) for shape in ((H, P), (H,), (1, N), (1, N)))
    q, k, v = (torch.randn(1, T, heads, 64, dtype=bf16) for heads in (4, 4, 8))
    g, beta = -torch.rand(1, T, 8), torch.rand(1, T, 8)
    q1, k1, v1 = (torch.randn(B, heads, 64, dtype=bf16) for heads in (4, 4, 8))
    g1, beta1, gdn_pool = -torch.rand(B, 8), torch.rand(B, 8), torch.randn(16, 8, 64, 64)
    cumsum, step = torch.randn(1, H, 1, 128), torch.randn(1, H, 1, 128)
    states, CB = torch.randn(1, 1, H, P, N), torch.randn(1, 1, 1, 128, 128)
    A64, sums = torch.randn(1, T, 8, 64), torch.randn(1, T, 8)
    A16, w, u = (torch.randn(1, T, 8, 64, dtype=bf16) for _ in range(3))
    h = torch.randn(1, 2, 8, 64, 64, dtype=bf16)
    scan = functools.partial(
        triton_ssm.mamba_chunk_scan_combined, X, DT, A, Bs, Cs, chunk_size=128, D=D, dt_bias=bias, dt_softplus=True,
        return_final_states=True,
    )  # fmt: skip

    def in_pieces() -> Any:
        with triton_ssm.override("mamba_chunk_scan_combined", CHUNKS_PER_PIECE=1, STATES_PER_PIECE=1):
            return scan()

    def by_tma() -> Any:
        with triton_ssm.override("gdn_solve_tril", use_tma=True):
            return gdn.solve_tril(A64)

    return {
        "selective_state_update": lambda: triton_ssm.selective_state_update(
            pool, x, dt, A, B_, C, D=D, dt_bias=bias, dt_softplus=True, state_batch_indices=slots
        ),
        "causal_conv1d_update": lambda: triton_ssm.causal_conv1d_update(
            conv_x, conv_pool, weight, activation="silu", conv_state_indices=slots
        ),
        "causal_conv1d": lambda: triton_ssm.causal_conv1d(prompt, weight, activation="silu"),
        "causal_conv1d_split": lambda: triton_ssm.causal_conv1d_split(prompt, weight, [256, 128, 128], activation="silu"),
        "mamba_chunk_scan_combined": scan,
        "mamba_chunk_scan_combined, in pieces": in_pieces,
        "ssd.chunk_cumsum": lambda: ssd.chunk_cumsum(DT, A, chunk_size=128, dt_bias=bias, dt_softplus=True),
        "ssd.chunk_state": lambda: ssd.chunk_state(X, Bs, step, cumsum),
        "ssd.state_passing": lambda: ssd.state_passing(states, cumsum),
        "ssd.bmm_chunk": lambda: ssd.bmm_chunk(Cs, Bs, chunk_size=128),
        "ssd.chunk_scan": lambda: ssd.chunk_scan(CB, X, step, cumsum, Cs, states, D=D),
        "chunk_gated_delta_rule": lambda: triton_ssm.chunk_gated_delta_rule(
            q, k, v, g, beta, use_qk_l2norm=True, return_final_state=True
        ),
        "gdn.chunk_local_cumsum": lambda: gdn.chunk_local_cumsum(g),
        "gdn.chunk_scaled_dot_kkt": lambda: gdn.chunk_scaled_dot_kkt(k, beta, g=g),
        "gdn.solve_tril": lambda: gdn.solve_tril(A64),
        "gdn.solve_tril, by TMA": by_tma,
        "gdn.recompute_w_u": lambda: gdn.recompute_w_u(k, v, beta, A16, g=sums),
        "gdn.chunk_delta_h": lambda: gdn.chunk_delta_h(k, w, u, g=sums),
        "gdn.chunk_o": lambda: gdn.chunk_o(q, k, v, h, g=sums),
        "fused_recurrent_gated_delta_rule": lambda: triton_ssm.fused_recurrent_gated_delta_rule(
            q1, k1, v1, g1, beta1, gdn_pool, state_indices=slots, use_qk_l2norm=True
        ),
    }  # fmt: skip


def tensors_of(call: Callable[[], Any]) -> list[torch.Tensor]:
    """Those in a lambda's or a partial's reach."""
    found = [cell.cell_contents for cell in getattr(call, "__closure__", None) or ()]
    found += [*getattr(call, "args", ()), *getattr(call, "keywords", {}).values()]
    nested = [tensors_of(part) for part in found if callable(part) and not isinstance(part, torch.Tensor)]
    return [part for part in found if isinstance(part, torch.Tensor)] + list(itertools.chain(*nested))


def _us(call: Callable[[], Any], count: int = 500) -> float:
    for _ in range(5):
        call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count // 5):
            call()
        times.append((time.perf_counter() - start) / (count // 5) * 1e6)
    return min(times)


def main(name: str = "") -> None:
    install().timed = True
    for label, call in calls().items():
        print(f"{label:40s} {_us(call):7.1f} us", flush=True)
        if label == name:
            import cProfile
            import pstats

            with cProfile.Profile() as profile:
                for _ in range(2000):
                    call()
            pstats.Stats(profile).sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    # The module that operators and tests see, rather than a second one of its name.
    from parity_tests.stub_driver import main

    main(*sys.argv[1:2])
