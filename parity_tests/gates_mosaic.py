"""Compiles `pallas_ssm`'s kernels ahead of time, for one architecture and without a GPU, and reports what they use.

    python -m parity_tests.gates_mosaic --arch sm_90a --rows '[{"P": 64, "N": 128, "state_dtype": "float32", …}]'

prints a JSON list, one object a row: the launch, registers, stack and spilled bytes of a thread, shared memory of a block,
bytes of the donated state that the program updates in place, and copies of the state in its optimised HLO. A process of
its own for each architecture, because XLA's compiler keeps the first one it sees; and apart from the interpreter's.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TARGETS = Path(__file__).parent / "data/targets"
ARCHITECTURES = ("sm_90a", "sm_100a", "sm_120a")
KNOBS = ("BLOCK_SIZE_M", "tiles_per_block", "use_tma")
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def shapes(row: Mapping[str, Any]) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, Any]]:
    """(arrays' shapes and dtypes, other keywords) of a row's call.

    By default what serving runs: tied dt, A and D, dt_bias, softplus, slots; x in bfloat16, Nemotron-H's heads and groups.
    A row may ask for `untied`, `z`, `dst`, `padding` (a null slot), `packed`, `speculative`, `rounding`, and other sizes.
    """
    P, N = row["P"], row["N"]
    S, B, H, G, T_max = (
        row.get(key, default) for key, default in (("S", 96), ("B", 64), ("H", 128), ("G", 8), ("T_max", 4))
    )
    tokens = 4 * B if row.get("packed") else B
    untied, x_dtype = row.get("untied"), row.get("dtype", "bfloat16")
    arrays: dict[str, tuple[tuple[int, ...], str]] = {
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


class Compiler:
    """Ahead-of-time compilation for one architecture. Make it before jax is imported anywhere else in the process."""

    def __init__(self, arch: str, dump: Path):
        self._dump = dump
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["MOSAIC_GPU_DUMP_TO"] = str(dump)
        import jax
        from jax.experimental import topologies

        target = (TARGETS / f"{arch}.txtpb").read_text(encoding="utf-8")
        topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
        mesh = topologies.make_mesh(topology, (1,), ("device",))
        self._device = topology.devices[0]
        self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def compile(self, arrays: Mapping[str, tuple[tuple[int, ...], str]], function, donate: bool) -> Any:
        """`function(state, others)`."""
        import jax

        for file in self._dump.iterdir():
            file.unlink()
        abstract = {
            name: jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype), sharding=self._sharding)
            for name, (shape, dtype) in arrays.items()
        }
        # The lowering, and our choice of a launch, take the default device's architecture.
        with jax.default_device(self._device):
            return (
                jax.jit(function, donate_argnums=0 if donate else ()).lower(abstract.pop("state"), abstract).compile()
            )

    def resources(self) -> dict[str, int]:
        """What ptxas says of the last compile's kernel."""
        (log,) = self._dump.glob("*.ptxas")
        text = log.read_text()
        registers = re.search(r"Used (\d+) registers", text)
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        shared = re.search(r"smem_scratch_bytes=(\d+)", log.with_suffix(".resources.txt").read_text())
        if registers is None or spills is None or shared is None:
            raise RuntimeError(f"expected a resource usage line from ptxas, got {text!r}")
        return {
            "registers": int(registers[1]),
            "stack_bytes": int(spills[1]),
            "spill_bytes": int(spills[2]) + int(spills[3]),
            "shared_bytes": int(shared[1]),
        }

    def ptx(self) -> str:
        (file,) = self._dump.glob("*.ptx")
        return file.read_text()


def compile_row(compiler: Compiler, row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with what its program uses; no registers and the like where it asks for the XLA form."""
    import pallas_ssm

    arrays, keywords = shapes(row)
    keywords["implementation"] = row.get("implementation", "mosaic_gpu")
    launch = None

    def call(state, others):
        nonlocal launch
        launch = pallas_ssm.explain("selective_state_update", state, **others, **keywords).launch
        return pallas_ssm.selective_state_update(state, **others, **keywords)

    knobs = {name: row[name] for name in KNOBS if name in row}
    pin = pallas_ssm.override("selective_state_update", twin="pallas", **knobs) if knobs else contextlib.nullcontext()
    with pin:
        compiled = compiler.compile(arrays, call, donate=row.get("donate", True))
    used = {}
    if launch is not None:
        used = {"launched": {name: getattr(launch, name) for name in KNOBS}, **compiler.resources()}
    shape, dtype = arrays["state"]
    state = re.escape(f"{_SHORT[dtype]}[{','.join(map(str, shape))}]")
    return {
        **row,
        **used,
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
