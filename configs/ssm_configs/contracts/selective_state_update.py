"""What `selective_state_update` accepts: one set of rules, one set of error texts, both packages."""

from collections.abc import Mapping
from dataclasses import dataclass

from ._shapes import FLOATS, INTEGERS, Shape, check_null_slot, expect_dtype, expect_rank, expect_shape, format_shape

STATE_DTYPES = FLOATS
# Tensors that every call has, and those that it may have, in the order of the signature.
REQUIRED = ("state", "x", "dt", "A", "B", "C")
OPTIONAL = (
    "D",
    "z",
    "dt_bias",
    "state_batch_indices",
    "dst_state_batch_indices",
    "cu_seqlens",
    "num_accepted_tokens",
)
INDICES = ("state_batch_indices", "dst_state_batch_indices", "cu_seqlens", "num_accepted_tokens")


@dataclass(frozen=True)
class Dims:
    """The sizes and the forms that a legal call has."""

    S: int
    """State slots."""
    T: int
    """Tokens, over all sequences."""
    N_seq: int
    """Sequences: T of them without cu_seqlens."""
    H: int
    G: int
    P: int
    N: int
    T_max: int
    """Slots of a sequence in speculative decode, else 1."""
    headless: bool
    """Every argument leaves the head axis (and B and C the group axis) out; H = G = 1."""
    tied_dt: bool
    """dt is one number per head: [T,H] rather than [T,H,P]."""
    tied_A: bool
    """A is one number per head: [H] rather than [H,P,N]."""
    tied_dt_bias: bool
    tied_D: bool


def check(
    shapes: Mapping[str, Shape | None],
    dtypes: Mapping[str, str | None],
    *,
    null_slot: int | None = None,
    stochastic_rounding: bool = False,
) -> Dims:
    """The dims of a legal call; ValueError (shapes, options) or TypeError (dtypes) otherwise.

    `shapes` and `dtypes` map argument names to shapes and dtype names ("bfloat16"); None stands for an argument that
    was not given.
    """
    given = {name: shape for name in (*REQUIRED, *OPTIONAL) if (shape := shapes.get(name)) is not None}
    _check_dtypes(given, dtypes)

    headless = len(given["state"]) == 3
    if not headless and len(given["state"]) != 4:
        raise ValueError(
            f"state: expected rank 4 [S, H, P, N], or rank 3 [S, P, N] with head-less arguments, got rank "
            f"{len(given['state'])} with shape {format_shape(given['state'])}"
        )
    S, P, N = given["state"][0], *given["state"][-2:]
    H = G = 1
    if not headless:
        H = given["state"][1]
    if S < 1:
        raise ValueError("state: expected at least one slot, got S=0")
    for size, dim in ((H, "H"), (P, "P"), (N, "N")):
        if size < 1:
            raise ValueError(f"state: expected {dim} >= 1, got shape {format_shape(given['state'])}")
    heads: dict[str, int] = {} if headless else {"H": H}

    expect_rank("x", given["x"], "T P" if headless else "T H P")
    T = given["x"][0]
    token, row = {"T": T}, {**heads, "P": P}
    expect_shape("x", given["x"], token | row)
    tied_dt = expect_shape("dt", given["dt"], token | heads, token | row) == 0
    tied_A = expect_shape("A", given["A"], heads, {**row, "N": N}) == 0

    expect_rank("B", given["B"], "T N" if headless else "T G N")
    if headless:
        groups: dict[str, int] = {}
    else:
        G = given["B"][1]
        if G < 1 or H % G:
            raise ValueError(
                f"B: expected shape (T={T}, G, N={N}) with H={H} divisible by G, got {format_shape(given['B'])}"
            )
        groups = {"G": G}
    for name in ("B", "C"):
        expect_shape(name, given[name], token | groups | {"N": N})

    tied_D = "D" not in given or expect_shape("D", given["D"], heads, row) == 0
    tied_dt_bias = "dt_bias" not in given or expect_shape("dt_bias", given["dt_bias"], heads, row) == 0
    if "z" in given:
        expect_shape("z", given["z"], token | row)

    N_seq = T
    if "cu_seqlens" in given:
        expect_rank("cu_seqlens", given["cu_seqlens"], "N_seq+1")
        N_seq = given["cu_seqlens"][0] - 1
        if N_seq < 0:
            raise ValueError("cu_seqlens: expected shape (N_seq + 1,) with at least one entry, got (0,)")
    T_max = _check_slots(given, N_seq, S, null_slot)
    if stochastic_rounding and dtypes["state"] == "float32":
        raise ValueError("rounding_seed: expected None with a float32 state, which is stored without rounding")
    return Dims(S, T, N_seq, H, G, P, N, T_max, headless, tied_dt, tied_A, tied_dt_bias, tied_D)


def _check_dtypes(given: Mapping[str, Shape], dtypes: Mapping[str, str | None]) -> None:
    for name in given:
        got = dtypes[name]
        if got is None:
            raise TypeError(f"{name}: expected a dtype beside the shape, got None")
        expect_dtype(name, got, INTEGERS if name in INDICES else FLOATS)


def _check_slots(given: Mapping[str, Shape], N_seq: int, S: int, null_slot: int | None) -> int:
    """Checks the slot arguments; T_max."""
    source, target = given.get("state_batch_indices"), given.get("dst_state_batch_indices")
    if source is None:
        if "num_accepted_tokens" in given:
            raise ValueError(
                "state_batch_indices: expected shape (N_seq, T_max) with num_accepted_tokens (a slot for every "
                "token), got None"
            )
        if target is not None:
            raise ValueError("dst_state_batch_indices: expected None without state_batch_indices")
        if null_slot is not None:
            raise ValueError(f"null_slot: expected None without state_batch_indices, got {null_slot}")
        if S < N_seq:
            raise ValueError(f"state: expected at least one slot for each of {N_seq} sequences, got S={S}")
        return 1
    check_null_slot(null_slot)
    sequences = {"N_seq": N_seq}
    T_max = 1
    if "num_accepted_tokens" in given:
        expect_shape("num_accepted_tokens", given["num_accepted_tokens"], sequences)
        if len(source) != 2 or source[0] != N_seq or source[1] < 1:
            raise ValueError(
                f"state_batch_indices: expected shape (N_seq={N_seq}, T_max) with num_accepted_tokens (a slot for "
                f"every token), got {format_shape(source)}"
            )
        T_max = source[1]
        sequences = sequences | {"T_max": T_max}
    expect_shape("state_batch_indices", source, sequences)
    if target is not None:
        expect_shape("dst_state_batch_indices", target, sequences)
    return T_max
