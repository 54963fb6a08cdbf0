"""Where the chunks of a batch stand, for the definitions of the chunked operators."""

import itertools
from typing import Any, NamedTuple


class Chunk(NamedTuple):
    b: int
    slot: int
    begin: int
    end: int
    sequence: int


def chunks(B: int, T: int, L: int, cu_seqlens: Any) -> tuple[int, list[Chunk]]:
    """(NC, the chunks that exist, each sequence's in order). Packed, sequence n's begin at slot cu_seqlens[n] // L + n."""
    if cu_seqlens is None:
        rows = [(b, 0, T, 0) for b in range(B)]
        NC = -(-T // L)
    else:
        bounds = [int(bound) for bound in cu_seqlens]
        rows = [(0, begin, end, begin // L + n) for n, (begin, end) in enumerate(itertools.pairwise(bounds))]
        NC = T // L + len(rows)
    return NC, [
        Chunk(b, slot + c, start, min(start + L, end), n)
        for n, (b, begin, end, slot) in enumerate(rows)
        for c, start in enumerate(range(begin, end, L))
    ]
