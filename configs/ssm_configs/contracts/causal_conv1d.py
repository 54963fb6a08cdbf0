"""What `causal_conv1d`, `causal_conv1d_split` and `causal_conv1d_update` accept: one set of rules for both packages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._shapes import Shape, check_null_slot, expect_rank, expect_same_dtype, expect_shape, format_shape, given_arguments

WIDTHS = (2, 3, 4, 5, 6)
ACTIVATIONS = (None, "silu", "swish")
MAX_PARTS = 4

PREFILL: tuple[str, ...] = (
    "x", "weight", "bias", "initial_state", "cu_seqlens", "conv_state", "state_indices", "has_initial_state",
)  # fmt: skip
UPDATE: tuple[str, ...] = (
    "x",
    "conv_state",
    "weight",
    "bias",
    "conv_state_indices",
    "cu_seqlens",
    "num_accepted_tokens",
)
_INDICES = ("cu_seqlens", "state_indices", "conv_state_indices", "num_accepted_tokens")


@dataclass(frozen=True)
class Dims:
    """The sizes of a legal call."""

    B: int
    """Batch rows; 1 when packed."""
    T: int
    """Tokens of a batch row; in an update, all tokens."""
    D: int
    W: int
    N_seq: int
    """Sequences: B of them without cu_seqlens (T in an update)."""
    S: int
    """Slots of the pool; 0 without one."""
    L: int
    """Rows of a slot of the pool; 0 without one."""
    packed: bool
    rows: int
    """Rows of the output of a batch row: T, or T padded to chunks."""


def silu_asked(activation: object) -> bool:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def check_prefill(
    shapes: Mapping[str, Shape | None],
    dtypes: Mapping[str, str | None],
    *,
    null_slot: int | None = None,
    sizes: Sequence[int] | None = None,
    chunk_size: int | None = None,
) -> Dims:
    """The dims of a legal `causal_conv1d` (or, with `sizes`, `causal_conv1d_split`) call."""
    given = given_arguments(PREFILL, shapes, dtypes, integers=_INDICES, bools=("has_initial_state",))
    expect_rank("x", given["x"], "B T D")
    B, T, D = given["x"]
    W = _check_weight(given, D)

    packed = "cu_seqlens" in given
    N_seq = B
    if packed:
        if B != 1:
            raise ValueError(f"x: expected B=1 with cu_seqlens, got {format_shape(given['x'])}")
        N_seq = _sequences(given)

    S = L = 0
    if "conv_state" in given:
        S, L = _check_pool(given, dtypes, D, W)
        if "initial_state" in given:
            raise ValueError("initial_state: expected None with conv_state, whose slots hold the initial states")
        for name in ("state_indices", "has_initial_state"):
            if name not in given:
                raise ValueError(f"{name}: expected shape (N_seq={N_seq},) with conv_state, got None")
            expect_shape(name, given[name], {"N_seq": N_seq})
    else:
        for name in ("state_indices", "has_initial_state"):
            if name in given:
                raise ValueError(f"{name}: expected None without conv_state")
        if null_slot is not None:
            raise ValueError(f"null_slot: expected None without conv_state, got {null_slot}")
        if "initial_state" in given:
            expect_shape("initial_state", given["initial_state"], {"N_seq": N_seq, "W-1": W - 1, "D": D})
            expect_same_dtype("initial_state", "x", dtypes)
    check_null_slot(null_slot)
    return Dims(B, T, D, W, N_seq, S, L, packed, _rows(T, D, N_seq, packed, sizes, chunk_size))


def check_update(
    shapes: Mapping[str, Shape | None], dtypes: Mapping[str, str | None], *, null_slot: int | None = None
) -> Dims:
    """The dims of a legal `causal_conv1d_update` call."""
    given = given_arguments(UPDATE, shapes, dtypes, integers=_INDICES)
    expect_rank("x", given["x"], "T D")
    T, D = given["x"]
    W = _check_weight(given, D)
    packed = "cu_seqlens" in given
    N_seq = _sequences(given) if packed else T
    S, L = _check_pool(given, dtypes, D, W)
    if "conv_state_indices" in given:
        expect_shape("conv_state_indices", given["conv_state_indices"], {"N_seq": N_seq})
    else:
        if null_slot is not None:
            raise ValueError(f"null_slot: expected None without conv_state_indices, got {null_slot}")
        if S < N_seq:
            raise ValueError(f"conv_state: expected at least one slot for each of {N_seq} sequences, got S={S}")
    if "num_accepted_tokens" in given:
        expect_shape("num_accepted_tokens", given["num_accepted_tokens"], {"N_seq": N_seq})
    check_null_slot(null_slot)
    return Dims(1, T, D, W, N_seq, S, L, packed, T)


def _check_weight(given: Mapping[str, Shape], D: int) -> int:
    expect_rank("weight", given["weight"], "D W")
    W = given["weight"][1]
    expect_shape("weight", given["weight"], {"D": D, "W": W})
    if W not in WIDTHS:
        raise ValueError(f"weight: expected a width of 2 to 6, got W={W} with shape {format_shape(given['weight'])}")
    if D < 1:
        raise ValueError(f"x: expected D >= 1, got shape {format_shape(given['x'])}")
    if "bias" in given:
        expect_shape("bias", given["bias"], {"D": D})
    return W


def _sequences(given: Mapping[str, Shape]) -> int:
    expect_rank("cu_seqlens", given["cu_seqlens"], "N_seq+1")
    if given["cu_seqlens"][0] < 1:
        raise ValueError("cu_seqlens: expected shape (N_seq + 1,) with at least one entry, got (0,)")
    return given["cu_seqlens"][0] - 1


def _check_pool(given: Mapping[str, Shape], dtypes: Mapping[str, str | None], D: int, W: int) -> tuple[int, int]:
    pool = given["conv_state"]
    expect_rank("conv_state", pool, "S L D")
    if pool[1] < W - 1 or pool[2] != D:
        raise ValueError(
            f"conv_state: expected shape (S, L, D={D}) with L >= {W - 1} rows for width {W}, got {format_shape(pool)}"
        )
    # A state is a copy of inputs, bit for bit.
    expect_same_dtype("conv_state", "x", dtypes)
    return pool[0], pool[1]


def check_sizes(sizes: object) -> tuple[Any, ...]:
    """Of parts, in a tuple; what is in it `check_prefill` looks at."""
    if not isinstance(sizes, tuple | list):
        raise TypeError(f"sizes: expected a tuple of ints, got {type(sizes).__name__}")
    return tuple(sizes)


def _rows(T: int, D: int, N_seq: int, packed: bool, sizes: Sequence[int] | None, chunk_size: int | None) -> int:
    if sizes is not None:
        counts = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
        if not counts or not 1 <= len(sizes) <= MAX_PARTS or sum(sizes) != D:
            raise ValueError(
                f"sizes: expected 1 to {MAX_PARTS} positive channel counts that add up to D={D}, got {tuple(sizes)}"
            )
    if chunk_size is None:
        return T
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size: expected an int or None, got {type(chunk_size).__name__}")
    if not 16 <= chunk_size <= 2048 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size: expected a power of two from 16 to 2048, got {chunk_size}")
    return chunk_size * (T // chunk_size + N_seq if packed else -(-T // chunk_size))
