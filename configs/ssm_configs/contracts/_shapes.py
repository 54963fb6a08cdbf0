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
