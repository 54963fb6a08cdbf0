"""Shape and dtype checks on plain tuples and names, and the words of their errors."""

from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]

FLOATS = ("float32", "bfloat16", "float16")
INTEGERS = ("int32", "int64")


def format_shape(shape: Sequence[object]) -> str:
    """(4, 'H=8', 64) as "(4, H=8, 64)"."""
    return "(" + ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "") + ")"


def expect_dtype(name: str, got: str, legal: Sequence[str]) -> None:
    if got not in legal:
        raise TypeError(f"{name}: expected dtype {' or '.join(legal)}, got {got}")


def as_float(number: float) -> float:
    """Infinite where it is an int that no float holds."""
    try:
        return float(number)
    except OverflowError:
        return float("inf") if number > 0 else float("-inf")


def check_null_slot(null_slot: object) -> None:
    if null_slot is None:
        return
    if isinstance(null_slot, bool) or not isinstance(null_slot, int):
        raise TypeError(f"null_slot: expected an int or None, got {type(null_slot).__name__}")
    if not -(2**31) <= null_slot < 2**31:
        raise ValueError(f"null_slot: expected a slot number of 32 bits, got {null_slot}")


def expect_shape(name: str, got: Shape, *options: Mapping[str, int]) -> int:
    """The index of the option whose sizes `got` has; each option maps the dims' names to their sizes, in order."""
    for index, option in enumerate(options):
        if got == tuple(option.values()):
            return index
    expected = " or ".join(format_shape([f"{dim}={size}" for dim, size in option.items()]) for option in options)
    raise ValueError(f"{name}: expected shape {expected}, got {format_shape(got)}")


def expect_rank(name: str, got: Shape, dims: str) -> None:
    if len(got) != len(dims.split()):
        raise ValueError(
            f"{name}: expected rank {len(dims.split())} [{', '.join(dims.split())}], got rank {len(got)} "
            f"with shape {format_shape(got)}"
        )


def given_arguments(
    names: Sequence[str],
    shapes: Mapping[str, Shape | None],
    dtypes: Mapping[str, str | None],
    *,
    integers: Sequence[str],
    bools: Sequence[str] = (),
) -> dict[str, Shape]:
    """The shapes of those arguments that are there, once their dtypes are legal."""
    given = {name: shape for name in names if (shape := shapes.get(name)) is not None}
    for name in given:
        expect_dtype(name, str(dtypes[name]), INTEGERS if name in integers else ("bool",) if name in bools else FLOATS)
    return given


def expect_same_dtype(name: str, other: str, dtypes: Mapping[str, str | None]) -> None:
    if dtypes[name] != dtypes[other]:
        raise TypeError(f"{name}: expected the dtype of {other}, {dtypes[other]}, got {dtypes[name]}")


def expect_positive(name: str, shape: Shape, **sizes: int) -> None:
    for dim, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected {dim} >= 1, got shape {format_shape(shape)}")


def sequences(given: Mapping[str, Shape], first: str, B: int) -> tuple[int, bool]:
    """(N_seq, packed); `first` is the argument that brought B."""
    if "cu_seqlens" not in given:
        return B, False
    expect_rank("cu_seqlens", given["cu_seqlens"], "N_seq+1")
    if given["cu_seqlens"][0] < 1:
        raise ValueError("cu_seqlens: expected shape (N_seq + 1,) with at least one entry, got (0,)")
    if B != 1:
        raise ValueError(f"{first}: expected B=1 with cu_seqlens, got {format_shape(given[first])}")
    return given["cu_seqlens"][0] - 1, True


def chunks(T: int, L: int, N_seq: int, packed: bool) -> int:
    """Chunks of a batch row, or slots for those of all packed sequences."""
    return T // L + N_seq if packed else -(-T // L)


def check_chunk_size(chunk_size: object, low: int = 16, high: int = 2048) -> int:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size: expected an int, got {type(chunk_size).__name__}")
    if not low <= chunk_size <= high or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size: expected a power of two from {low} to {high}, got {chunk_size}")
    return chunk_size


def check_precision(precision: object) -> str:
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision: expected 'ieee' or 'tf32', got {precision!r}")
    return str(precision)


def check_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value
