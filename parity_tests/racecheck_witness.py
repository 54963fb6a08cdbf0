# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportAssignmentType=false
# A jitted function is Gluon's language in Python's syntax; the types are Gluon's too.
"""The smallest kernel in which one warp hands shared memory to others as the Gluon kernels do.

    python -m parity_tests.racecheck_witness

All lanes store, `bar.warp.sync`, one lane arrives at an mbarrier (release), the readers wait for it (acquire): ordered, by
causality in PTX's memory model. compute-sanitizer's racecheck reports a race all the same, for it counts an arrival for the
lane that arrives and not for those that it has synchronised with. So it cannot watch kernels of this kind.
"""

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

SIZE = 128


@gluon.jit
def _write(shared, ready):
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    shared.store(gl.arange(0, shared.shape[0], layout=layout))
    gl.thread_barrier()
    mbarrier.arrive(ready)


@gluon.jit
def _read(shared, ready, out_ptr):
    mbarrier.wait(ready, 0)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    gl.store(out_ptr + gl.arange(0, shared.shape[0], layout=layout), shared.load(layout))


@gluon.jit
def racecheck_witness_kernel(out_ptr, SIZE: gl.constexpr):
    shared = gl.allocate_shared_memory(gl.int32, [SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    gl.thread_barrier()
    gl.warp_specialize([(_read, (shared, ready, out_ptr)), (_write, (shared, ready))], [1], [40])


def main() -> int:
    out = torch.full((SIZE,), -1, dtype=torch.int32, device="cuda")
    racecheck_witness_kernel[(1,)](out, SIZE, num_warps=4)
    return 0 if torch.equal(out.cpu(), torch.arange(SIZE, dtype=torch.int32)) else 1


if __name__ == "__main__":
    sys.exit(main())
