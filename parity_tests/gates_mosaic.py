"""Compiles `pallas_ssm`'s kernels ahead of time, for one architecture and without a GPU, and reports what they use.

    python -m parity_tests.gates_mosaic --arch sm_90a --rows '[{"P": 64, "N": 128, "state_dtype": "float32", …}]'

A row is of `selective_state_update` unless it names another `op`. This prints a JSON list, one object a row: the launch,
registers, stack and spilled bytes of a thread, shared memory of a block, bytes of the donated state (0 for a call without one)
that the program updates in place, and copies of the state in its optimised HLO. A process of
its own for each architecture, because XLA's compiler keeps the first one it sees; and apart from the interpreter's.
"""

import argparse
import contextlib
import ctypes
import json
import math
import operator
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = Path(__file__).parent / "data/targets"
ARCHITECTURES = ("sm_90a", "sm_100a", "sm_120a")
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

Arrays = dict[str, tuple[tuple[int, ...], str]]
"""Shapes and dtypes by argument."""


def selective_state_update(row: Mapping[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """(arrays, other keywords) of a row's call.

    By default what serving runs: tied dt, A and D, dt_bias, softplus, slots; x in bfloat16, Nemotron-H's heads and groups.
    A row may ask for `untied`, `z`, `dst`, `padding` (a null slot), `packed`, `speculative`, `rounding`, and other sizes.
    """
    P, N = row["P"], row["N"]
    S, B, H, G, T_max = (
        row.get(key, default) for key, default in (("S", 96), ("B", 64), ("H", 128), ("G", 8), ("T_max", 4))
    )
    tokens = 4 * B if row.get("packed") else B
    untied, x_dtype = row.get("untied"), row.get("dtype", "bfloat16")
    arrays: Arrays = {
        "state": ((S, H, P, N), row["state_dtype"]),
        "x": ((tokens, H, P), x_dtype),
        "dt": ((tokens, H, P) if untied else (tokens, H), x_dtype),
        "A": ((H, P, N) if untied else (H,), "float32"),
        "B": ((tokens, G, N), x_dtype),
        "C": ((tokens, G, N), x_dtype),
        "D": ((H, P) if untied else (H,), "float32"),
        "dt_bias": ((H, P) if untied else (H,), "float32"),
    }
    slots = (B, T_max) if row.get("speculative") else (B,)
    if row.get("slots", True):
        arrays["state_batch_indices"] = slots, "int32"
    if row.get("z"):
        arrays["z"] = (tokens, H, P), x_dtype
    if row.get("dst"):
        arrays["dst_state_batch_indices"] = slots, "int32"
    if row.get("speculative"):
        arrays["num_accepted_tokens"] = (B,), "int32"
    if row.get("packed"):
        arrays["cu_seqlens"] = (B + 1,), "int32"
    if row.get("rounding"):
        arrays["rounding_seed"] = (), "uint32"
    return arrays, {"dt_softplus": True, "null_slot": 0 if row.get("padding") else None}


def causal_conv1d(row: Mapping[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """The same for a prompt of T tokens by D channels, with a bias and SiLU; W, dtype and D are the row's.

    A row may ask for `sequences` (packed, so many), `pool` with its null slot, `initial` states, `sizes` and `chunk_size`.
    """
    B, T, D, W, N_seq = row.get("B", 1), row.get("T", 8192), row["D"], row["W"], row.get("sequences")
    dtype = row["dtype"]
    arrays: Arrays = {"x": ((B, T, D), dtype), "weight": ((D, W), dtype), "bias": ((D,), dtype)}
    keywords: dict[str, Any] = {name: row[name] for name in ("sizes", "chunk_size") if name in row}
    if N_seq is not None:
        arrays["cu_seqlens"] = (N_seq + 1,), "int32"
    if row.get("initial"):
        arrays["initial_state"] = (N_seq or B, W - 1, D), dtype
    if row.get("pool"):
        arrays["conv_state"] = (row.get("S", 64), W - 1, D), dtype
        arrays["state_indices"] = (N_seq or B,), "int32"
        arrays["has_initial_state"] = (N_seq or B,), "bool"
        keywords["null_slot"] = 0
    return arrays, keywords | {"activation": "silu"}


def causal_conv1d_update(row: Mapping[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """The same for B sequences, with a bias, SiLU, slots and a null slot. A row may ask for `packed` and `speculative`."""
    B, D, W, dtype = row["B"], row["D"], row["W"], row["dtype"]
    speculative = row.get("speculative")
    tokens = 4 * B if row.get("packed") else B
    arrays: Arrays = {
        "x": ((tokens, D), dtype),
        "conv_state": ((row.get("S", B + 8), W - 1 + 3 * bool(speculative), D), dtype),
        "weight": ((D, W), dtype),
        "bias": ((D,), dtype),
        "conv_state_indices": ((B,), "int32"),
    }
    if row.get("packed"):
        arrays["cu_seqlens"] = (B + 1,), "int32"
    if speculative:
        arrays["num_accepted_tokens"] = (B,), "int32"
    return arrays, {"activation": "silu", "null_slot": 0}


def fused_recurrent_gated_delta_rule(row: Mapping[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """The same for B sequences of H_v value heads by half as many key heads, with gates, norms and slots in the kernel.

    K, V and state_dtype are the row's. A row may ask for `dst`, `packed`, `speculative`, `plain` (gates and norms done before)
    and `padding`.
    """
    K, V, B, H_v = row["K"], row["V"], row.get("B", 64), row.get("H_v", 32)
    S, T_max, dtype = row.get("S", 96), row.get("T_max", 4), row.get("dtype", "bfloat16")
    tokens = 4 * B if row.get("packed") else B
    plain = bool(row.get("plain"))
    gate = (tokens, H_v), "float32" if plain else dtype
    arrays: Arrays = {
        "q": ((tokens, H_v // 2, K), dtype),
        "k": ((tokens, H_v // 2, K), dtype),
        "v": ((tokens, H_v, V), dtype),
        "g": gate,
        "beta": gate,
        "state": ((S, H_v, K, V), row["state_dtype"]),
    }
    slots = (B, T_max) if row.get("speculative") else (B,)
    if row.get("slots", True):
        arrays["state_indices"] = slots, "int32"
    if row.get("dst"):
        arrays["dst_state_indices"] = slots, "int32"
    if row.get("speculative"):
        arrays["num_accepted_tokens"] = (B,), "int32"
    if row.get("packed"):
        arrays["cu_seqlens"] = (B + 1,), "int32"
    if not plain:
        arrays |= {"A_log": ((H_v,), "float32"), "dt_bias": ((H_v,), "float32")}
    options = {"sigmoid_beta": not plain, "use_qk_l2norm": not plain}
    return arrays, options | {"null_slot": 0 if row.get("padding") else None}


def mamba_chunk_scan_combined(row: Mapping[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """The same for T tokens by H heads in G groups, from raw dt, with D and final states; P, N and dtype are the row's.

    A row may ask for `sequences` (packed, so many), `initial` states, `z`, `chunk_aligned` rows and `intermediate` states.
    """
    B, T, H, G, L = (
        row.get(key, default) for key, default in (("B", 1), ("T", 8192), ("H", 128), ("G", 8), ("L", 128))
    )
    P, N, N_seq, dtype = row["P"], row["N"], row.get("sequences"), row["dtype"]
    rows = T
    if row.get("chunk_aligned"):
        rows = L * (-(-T // L) if N_seq is None else T // L + N_seq)
    arrays: Arrays = {
        "x": ((B, rows, H, P), dtype),
        "dt": ((B, T, H), dtype),
        "A": ((H,), "float32"),
        "B": ((B, rows, G, N), dtype),
        "C": ((B, rows, G, N), dtype),
        "D": ((H,), "float32"),
        "dt_bias": ((H,), "float32"),
    }
    if row.get("z"):
        arrays["z"] = (B, T, H, P), dtype
    if N_seq is not None:
        arrays["cu_seqlens"] = (N_seq + 1,), "int32"
    if row.get("initial"):
        arrays["initial_states"] = (N_seq or B, H, P, N), "float32"
    return arrays, {
        "chunk_size": L, "dt_softplus": True, "return_final_states": True, "chunk_aligned": bool(row.get("chunk_aligned")),
        "return_intermediate_states": bool(row.get("intermediate")),
    }  # fmt: skip


def ssd_stage(row: Mapping[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """The same for one of the scan's stages, with every option that it has."""
    T, H, G, P, N, L, N_seq = (row.get(key) for key in ("T", "H", "G", "P", "N", "L", "sequences"))
    assert T and H and L
    NC = -(-T // L) if N_seq is None else T // L + N_seq
    x, group = ((1, T, H, P), row["dtype"]), ((1, T, G, N), row["dtype"])
    chunked, states = ((1, H, NC, L), "float32"), ((1, NC, H, P, N), "float32")
    heads = (H,), "float32"
    operands = {
        "ssd.chunk_cumsum": {"dt": ((1, T, H), row["dtype"]), "A": heads, "dt_bias": heads},
        "ssd.chunk_state": {"x": x, "B": group, "dt": chunked, "dA_cumsum": chunked},
        "ssd.state_passing": {
            "states": states, "dA_cumsum": chunked, "initial_states": ((N_seq or 1, H, P, N), "float32"),
        },
        "ssd.bmm_chunk": {"C": group, "B": group},
        "ssd.chunk_scan": {
            "CB": ((1, NC, G, L, L), "float32"), "x": x, "dt": chunked, "dA_cumsum": chunked, "C": group,
            "states": states, "D": heads, "z": x,
        },
    }  # fmt: skip
    keywords: dict[str, Any] = {}
    if row["op"] in ("ssd.chunk_cumsum", "ssd.bmm_chunk"):
        keywords["chunk_size"] = L
    if row["op"] == "ssd.chunk_cumsum":
        keywords |= {"dt_softplus": True, "dt_limit": (0.001, 0.1)}
    packed: Arrays = {} if N_seq is None else {"cu_seqlens": ((N_seq + 1,), "int32")}
    return operands[row["op"]] | packed, keywords


SSD_STAGES = ("ssd.chunk_cumsum", "ssd.chunk_state", "ssd.state_passing", "ssd.bmm_chunk", "ssd.chunk_scan")


class Op(NamedTuple):
    call: Callable[[Mapping[str, Any]], tuple[Arrays, dict[str, Any]]]
    state: str
    """The argument that is updated in place, where it is given."""
    knobs: tuple[str, ...]


OPS = {
    "selective_state_update": Op(selective_state_update, "state", ("BLOCK_SIZE_M", "tiles_per_block", "use_tma")),
    "causal_conv1d": Op(causal_conv1d, "conv_state", ("BLOCK_SIZE_T", "BLOCK_SIZE_D")),
    "causal_conv1d_update": Op(causal_conv1d_update, "conv_state", ("BLOCK_SIZE_D", "BLOCK_SIZE_B")),
    "fused_recurrent_gated_delta_rule": Op(fused_recurrent_gated_delta_rule, "state", ("BLOCK_SIZE_V",)),
    "mamba_chunk_scan_combined": Op(
        mamba_chunk_scan_combined,
        "final_states_out",
        ("CHUNKS_PER_PIECE", "HEADS_PER_BLOCK", "STATES_PER_PIECE", "num_stages"),
    ),
    **{name: Op(ssd_stage, "", ()) for name in SSD_STAGES},
}


@contextlib.contextmanager
def _printed(path: Path) -> Iterator[None]:
    """Into `path` what the process prints meanwhile, C++ code as well."""
    libc, kept = ctypes.CDLL(None), os.dup(1)
    sys.stdout.flush()
    libc.fflush(None)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


class Compiler:
    """Ahead-of-time compilation for one architecture. Make it before jax is imported anywhere else in the process."""

    def __init__(self, arch: str, dump: Path):
        self._said = dump / "stdout"
        os.environ["JAX_PLATFORMS"] = "cpu"
        # Printed, one by one: MOSAIC_GPU_DUMP_TO would write files, but the module after every pass, too, which takes as long
        # as to compile it.
        os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1"}
        import jax
        from jax.experimental import topologies

        target = (TARGETS / f"{arch}.txtpb").read_text(encoding="utf-8")
        topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
        mesh = topologies.make_mesh(topology, (1,), ("device",))
        self._device = topology.devices[0]
        self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def compile(self, arrays: Arrays, function: Callable[..., Any], donated: str | None = None) -> Any:
        """`function(**arrays)`, with the array `donated` given away."""
        import jax

        abstract = {
            name: jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype), sharding=self._sharding)
            for name, (shape, dtype) in arrays.items()
        }
        # The lowering, and our choice of a launch, take the default device's architecture.
        with jax.default_device(self._device), _printed(self._said):
            return jax.jit(function, donate_argnames=donated).lower(**abstract).compile()

    def resources(self) -> dict[str, int]:
        """What ptxas says of the last compile's kernels; of several, the most that one of them uses."""
        found = list(self.kernels().values())
        return {name: max(kernel[name] for kernel in found) for name in found[0]}

    def kernels(self) -> dict[str, dict[str, int]]:
        """The same by kernel."""
        text = self.said()
        # The lowering says each kernel's shared memory, the compiler the rest; both in the order of the program.
        shared = [int(size) for size in re.findall(r"smem_scratch_bytes=(\d+)", text)]
        compiled = re.findall(
            r"entry function '(\w+?)(?:_mosaic_gpu_kernel)?'(.*?)Used (\d+) registers", text, re.DOTALL
        )
        if not compiled or len(compiled) != len(shared):
            raise RuntimeError(f"expected a resource usage line from ptxas for every kernel, got {text!r}")
        found = {}
        for (name, properties, registers), shared_bytes in zip(compiled, shared, strict=True):
            spills = re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", properties
            )
            assert spills is not None, properties
            found[name] = {
                "registers": int(registers),
                "stack_bytes": int(spills[1]),
                "spill_bytes": int(spills[2]) + int(spills[3]),
                "shared_bytes": shared_bytes,
            }
        return found

    def said(self) -> str:
        """All that was printed during the last compile."""
        return self._said.read_text(errors="replace")


def compile_row(compiler: Compiler, row: Mapping[str, Any]) -> dict[str, Any]:
    import pallas_ssm

    name = row.get("op", "selective_state_update")
    op = OPS[name]
    arrays, keywords = op.call(row)
    function = f"{name}_split" if "sizes" in keywords else name
    launch = None

    def call(**given):
        nonlocal launch
        launch = pallas_ssm.explain(function, **given, **keywords, implementation="mosaic_gpu").launch
        return operator.attrgetter(function)(pallas_ssm)(**given, **keywords, implementation="mosaic_gpu")

    knobs = {name: row[name] for name in op.knobs if name in row}
    if knobs and name == "mamba_chunk_scan_combined":
        once = {"HEADS_PER_BLOCK": 1, "STATES_PER_PIECE": 1}
        knobs = {"FUSED": True, "CHUNKS_PER_PIECE": 128, "num_stages": 4} | once | knobs
    pin = pallas_ssm.override(name, twin="pallas", **knobs) if knobs else contextlib.nullcontext()
    with pin:
        donated = op.state if op.state in arrays and row.get("donate", True) else None
        compiled = compiler.compile(arrays, call, donated)
    assert launch is not None
    shape, dtype = arrays.get(op.state, ((0,), "float32"))
    state = re.escape(f"{_SHORT[dtype]}[{','.join(map(str, shape))}]")
    return {
        **row,
        "launched": {name: getattr(launch, name) for name in op.knobs},
        **compiler.resources(),
        "state_bytes": math.prod(shape) * (4 if dtype == "float32" else 2),
        "alias_bytes": compiled.memory_analysis().alias_size_in_bytes,
        "state_copies": len(re.findall(rf"= {state}\S* copy(?:-start)?\(", compiled.as_text())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Ahead-of-time compile of Mosaic GPU kernels, without a GPU.")
    parser.add_argument("--arch", required=True, choices=ARCHITECTURES)
    parser.add_argument("--rows", required=True, help="a JSON list of rows; - for standard input")
    arguments = parser.parse_args()
    rows = json.load(sys.stdin) if arguments.rows == "-" else json.loads(arguments.rows)
    with tempfile.TemporaryDirectory() as dump:
        compiler = Compiler(arguments.arch, Path(dump))
        print(json.dumps([compile_row(compiler, row) for row in rows]))


if __name__ == "__main__":
    main()
