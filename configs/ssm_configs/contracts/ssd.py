"""What the SSD chunk operators and `mamba_chunk_scan_combined` accept: one set of rules for both packages.

Chunks. Dense, batch row b has ceil(T / L) of them. Packed (B = 1, `cu_seqlens`), every sequence's chunks begin at its own first
token, and sequence n's chunk c stands in slot cu_seqlens[n] // L + n + c of T // L + N_seq: no sum over lengths, and always
room. Slots that no chunk stands in are skipped: what they hold has no meaning.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ._shapes import (
    FLOATS,
    Shape,
    as_float,
    expect_dtype,
    expect_positive,
    expect_rank,
    expect_same_dtype,
    expect_shape,
    given_arguments,
    sequences,
)
from ._shapes import check_chunk_size as check_chunk_size
from ._shapes import check_flag as check_flag
from ._shapes import check_precision as check_precision
from ._shapes import chunks as chunks

CHUNK_CUMSUM: tuple[str, ...] = ("dt", "A", "dt_bias", "cu_seqlens")
CHUNK_STATE: tuple[str, ...] = ("x", "B", "dt", "dA_cumsum", "cu_seqlens")
STATE_PASSING: tuple[str, ...] = ("states", "dA_cumsum", "initial_states", "cu_seqlens")
BMM_CHUNK: tuple[str, ...] = ("C", "B", "cu_seqlens")
CHUNK_SCAN: tuple[str, ...] = ("CB", "x", "dt", "dA_cumsum", "C", "states", "D", "z", "cu_seqlens")
COMBINED: tuple[str, ...] = (
    "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states", "cu_seqlens", "final_states_out", "final_state_indices",
)  # fmt: skip
_INDICES = ("cu_seqlens", "final_state_indices")


@dataclass(frozen=True)
class Dims:
    """The sizes of a legal call; 0 where a stage does not have them."""

    B: int
    """Batch rows; 1 when packed."""
    T: int
    """Tokens of a batch row."""
    H: int
    G: int
    P: int
    N: int
    L: int
    """Chunk size."""
    NC: int
    """Chunks of a batch row; packed, slots for chunks."""
    N_seq: int
    """Sequences: B of them without cu_seqlens."""
    packed: bool
    rows: int
    """Rows of x, B and C of a batch row: T, or, chunk-aligned, L·NC."""
    S: int = 0
    """Slots of `final_states_out`."""


def check_dt_limit(dt_limit: object) -> tuple[float, float]:
    pair = tuple(dt_limit) if isinstance(dt_limit, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(end, int | float) and not isinstance(end, bool) for end in pair):
        raise TypeError(f"dt_limit: expected a pair of numbers, got {dt_limit!r}")
    low, high = as_float(pair[0]), as_float(pair[1])
    if not 0 <= low <= high:  # False for NaN
        raise ValueError(f"dt_limit: expected 0 <= low <= high, got {dt_limit!r}")
    return low, high


def check_state_dtype(name: str) -> str:
    """`name`: the dtype's, in the words of the tables."""
    expect_dtype("state_dtype", name, FLOATS)
    return name


def check_chunk_cumsum(
    shapes: Mapping[str, Shape | None], dtypes: Mapping[str, str | None], *, chunk_size: object
) -> Dims:
    given = given_arguments(CHUNK_CUMSUM, shapes, dtypes, integers=_INDICES)
    L = check_chunk_size(chunk_size)
    expect_rank("dt", given["dt"], "B T H")
    B, T, H = given["dt"]
    expect_shape("A", given["A"], {"H": H})
    if "dt_bias" in given:
        expect_shape("dt_bias", given["dt_bias"], {"H": H})
    N_seq, packed = sequences(given, "dt", B)
    return Dims(B, T, H, 0, 0, 0, L, chunks(T, L, N_seq, packed), N_seq, packed, T)


def check_chunk_state(shapes: Mapping[str, Shape | None], dtypes: Mapping[str, str | None]) -> Dims:
    given = given_arguments(CHUNK_STATE, shapes, dtypes, integers=_INDICES)
    expect_rank("x", given["x"], "B T H P")
    B, T, H, P = given["x"]
    N_seq, packed = sequences(given, "x", B)
    G, N = _check_group_tensor("B", given, dtypes, B, T, H)
    L, NC = _check_dA_cumsum(given, B, T, H, N_seq, packed)
    _check_chunked_dt(given, dtypes, B, H, NC, L)
    return Dims(B, T, H, G, P, N, L, NC, N_seq, packed, T)


def check_state_passing(shapes: Mapping[str, Shape | None], dtypes: Mapping[str, str | None]) -> Dims:
    given = given_arguments(STATE_PASSING, shapes, dtypes, integers=_INDICES)
    expect_rank("states", given["states"], "B NC H P N")
    B, NC, H, P, N = given["states"]
    expect_dtype("states", str(dtypes["states"]), ("float32",))
    expect_dtype("dA_cumsum", str(dtypes["dA_cumsum"]), ("float32",))
    expect_rank("dA_cumsum", given["dA_cumsum"], "B H NC L")
    L = given["dA_cumsum"][3]
    expect_shape("dA_cumsum", given["dA_cumsum"], {"B": B, "H": H, "NC": NC, "L": L})
    check_chunk_size(L)
    N_seq, packed = sequences(given, "states", B)
    _check_initial_states(given, N_seq, H, P, N)
    return Dims(B, 0, H, 0, P, N, L, NC, N_seq, packed, 0)


def check_bmm_chunk(
    shapes: Mapping[str, Shape | None], dtypes: Mapping[str, str | None], *, chunk_size: object
) -> Dims:
    given = given_arguments(BMM_CHUNK, shapes, dtypes, integers=_INDICES)
    L = check_chunk_size(chunk_size)
    expect_rank("C", given["C"], "B T G N")
    B, T, G, N = given["C"]
    expect_shape("B", given["B"], {"B": B, "T": T, "G": G, "N": N})
    expect_same_dtype("B", "C", dtypes)
    expect_positive("C", given["C"], G=G, N=N)
    N_seq, packed = sequences(given, "C", B)
    return Dims(B, T, 0, G, 0, N, L, chunks(T, L, N_seq, packed), N_seq, packed, T)


def check_chunk_scan(shapes: Mapping[str, Shape | None], dtypes: Mapping[str, str | None]) -> Dims:
    given = given_arguments(CHUNK_SCAN, shapes, dtypes, integers=_INDICES)
    expect_rank("x", given["x"], "B T H P")
    B, T, H, P = given["x"]
    N_seq, packed = sequences(given, "x", B)
    G, N = _check_group_tensor("C", given, dtypes, B, T, H)
    L, NC = _check_dA_cumsum(given, B, T, H, N_seq, packed)
    _check_chunked_dt(given, dtypes, B, H, NC, L)
    expect_dtype("CB", str(dtypes["CB"]), ("float32",))
    expect_shape("CB", given["CB"], {"B": B, "NC": NC, "G": G, "L": L, " L": L})
    expect_shape("states", given["states"], {"B": B, "NC": NC, "H": H, "P": P, "N": N})
    _check_D_and_z(given, dtypes, B, T, H, P)
    return Dims(B, T, H, G, P, N, L, NC, N_seq, packed, T)


def check_combined(
    shapes: Mapping[str, Shape | None],
    dtypes: Mapping[str, str | None],
    *,
    chunk_size: object,
    chunk_aligned: bool = False,
) -> Dims:
    """`chunk_aligned`: x, B and C have their sequences at whole chunks, as `causal_conv1d_split` writes them."""
    given = given_arguments(COMBINED, shapes, dtypes, integers=_INDICES)
    L = check_chunk_size(chunk_size)
    expect_rank("x", given["x"], "B T H P")
    B, rows, H, P = given["x"]
    expect_rank("dt", given["dt"], "B T H")
    T = given["dt"][1]
    expect_shape("dt", given["dt"], {"B": B, "T": T, "H": H})
    N_seq, packed = sequences(given, "x", B)
    NC = chunks(T, L, N_seq, packed)
    if rows != (NC * L if chunk_aligned else T):
        dims = {"B": B, "chunk_size x NC" if chunk_aligned else "T": NC * L if chunk_aligned else T, "H": H, "P": P}
        expect_shape("x", given["x"], dims)
    expect_shape("A", given["A"], {"H": H})
    if "dt_bias" in given:
        expect_shape("dt_bias", given["dt_bias"], {"H": H})
    G, N = _check_group_tensor("B", given, dtypes, B, rows, H)
    expect_shape("C", given["C"], {"B": B, "T": rows, "G": G, "N": N})
    expect_same_dtype("C", "x", dtypes)
    _check_D_and_z(given, dtypes, B, T, H, P)
    _check_initial_states(given, N_seq, H, P, N)
    S = 0
    if "final_states_out" in given:
        pool = given["final_states_out"]
        expect_rank("final_states_out", pool, "S H P N")
        S = pool[0]
        expect_shape("final_states_out", pool, {"S": S, "H": H, "P": P, "N": N})
        if "final_state_indices" in given:
            expect_shape("final_state_indices", given["final_state_indices"], {"N_seq": N_seq})
        elif S < N_seq:
            raise ValueError(f"final_states_out: expected a slot for each of {N_seq} sequences, got S={S}")
    elif "final_state_indices" in given:
        raise ValueError("final_state_indices: expected None without final_states_out")
    return Dims(B, T, H, G, P, N, L, NC, N_seq, packed, rows, S)


def _check_group_tensor(
    name: str, given: Mapping[str, Shape], dtypes: Mapping[str, str | None], B: int, T: int, H: int
) -> tuple[int, int]:
    """(G, N) of B or C beside x."""
    expect_rank(name, given[name], "B T G N")
    G, N = given[name][2:]
    expect_shape(name, given[name], {"B": B, "T": T, "G": G, "N": N})
    expect_same_dtype(name, "x", dtypes)
    expect_positive("x", given["x"], H=H, P=given["x"][3])
    expect_positive(name, given[name], G=G, N=N)
    if H % G:
        raise ValueError(f"{name}: expected G to divide H={H}, got G={G}")
    return G, N


def _check_dA_cumsum(given: Mapping[str, Shape], B: int, T: int, H: int, N_seq: int, packed: bool) -> tuple[int, int]:
    """(L, NC)."""
    expect_rank("dA_cumsum", given["dA_cumsum"], "B H NC L")
    L = check_chunk_size(given["dA_cumsum"][3])
    NC = chunks(T, L, N_seq, packed)
    expect_shape("dA_cumsum", given["dA_cumsum"], {"B": B, "H": H, "NC": NC, "L": L})
    return L, NC


def _check_chunked_dt(
    given: Mapping[str, Shape], dtypes: Mapping[str, str | None], B: int, H: int, NC: int, L: int
) -> None:
    for name in ("dt", "dA_cumsum"):
        expect_dtype(name, str(dtypes[name]), ("float32",))
    expect_shape("dt", given["dt"], {"B": B, "H": H, "NC": NC, "L": L})


def _check_D_and_z(
    given: Mapping[str, Shape], dtypes: Mapping[str, str | None], B: int, T: int, H: int, P: int
) -> None:
    if "D" in given:
        expect_shape("D", given["D"], {"H": H}, {"H": H, "P": P})
    if "z" in given:
        expect_shape("z", given["z"], {"B": B, "T": T, "H": H, "P": P})
        expect_same_dtype("z", "x", dtypes)


def _check_initial_states(given: Mapping[str, Shape], N_seq: int, H: int, P: int, N: int) -> None:
    if "initial_states" in given:
        expect_shape("initial_states", given["initial_states"], {"N_seq": N_seq, "H": H, "P": P, "N": N})
