"""What the compile gates of Triton's kernels share: a process of their own, ptxas' words and the machine code.

Triton's interpreter, once chosen, replaces the compiler in the whole process.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def rows_apart(module: str, rows: Sequence[dict[str, Any]], *arguments: str) -> list[dict[str, Any]]:
    """What `python -m module`, given these rows as JSON, prints for each of them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def serialised(ptx: str) -> list[str]:
    """Where ptxas says that it makes products on tensor cores wait for one another, since it cannot see that they need not."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        said = _run("ptxas", "-v", "--gpu-name=sm_90a", file, "-o", file.with_suffix(".cubin")).stderr
    return re.findall(r"\(C75\d\d\).*", said)


def machine_code(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return _run("cuobjdump", "-sass", file).stdout


def _run(tool: str, *arguments: Any) -> "subprocess.CompletedProcess[str]":
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    return subprocess.run([tools / tool, *arguments], check=True, capture_output=True, text=True)
