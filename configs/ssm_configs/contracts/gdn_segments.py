"""Into which segments the fused gated delta rule cuts long sequences of few heads.

A state goes through a chain of chunks, and a device has more SMs than a few heads have chains. But what a segment of chunks
does to a state is linear, S -> T·S + E. One pass has all segments' T and E at the same time, the states before each follow in a
few small products, and a second pass runs all segments at once. The first pass is the price, so this is for few chains.
"""

from .gdn import Dims

CHUNK = 64
COLUMNS = 64
"""Of a state, in one program."""

# A chunk of the first pass and of the second, and what the states between the two take at all and for each segment; µs, H200.
_ENDS, _LOOP, _BETWEEN, _STATE = 0.8, 0.93, 12.0, 4.0
# Of the time of whole sequences: what it has to save at least, for these are estimates.
_WORTH = 0.85
_MOST = 16


def segment_chunks(rows: int, H_v: int, K: int, V: int, chunks: int, sms: int = 132) -> int:
    """Chunks of a segment, of `rows` sequences of as many `chunks`; `chunks` where they stay whole."""
    found = {chunks: chunks * _LOOP * _WORTH}
    for segments in range(2, _MOST + 1):
        # Programs of either pass, all of which run at the same time.
        if rows * H_v * max((segments - 1) * (K + V), segments * V) > sms * COLUMNS:
            break
        length = -(-chunks // segments)
        found.setdefault(length, length * (_ENDS + _LOOP) + _BETWEEN + segments * _STATE)
    return min(found, key=lambda length: found[length])


def segment_of(dims: Dims) -> int:
    """Chunks of a segment of any sequence; `dims.NC` where they stay whole.

    Packed sequences are cut as if they were of one length: nobody can ask a GPU for their bounds without waiting for it.
    Sequence n's first segment has number first slot // segment + n; where that leaves room for more, they are empty.
    """
    if not dims.N_seq:
        return dims.NC
    chunks = -(-dims.T // (CHUNK * dims.N_seq)) if dims.packed else dims.NC
    segment = segment_chunks(dims.N_seq, dims.H_v, dims.K, dims.V, chunks)
    return segment if segment < chunks else dims.NC
