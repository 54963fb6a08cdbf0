"""What the gated delta rule's operators accept: one set of rules for both packages.

Chunks lie as those of `ssd` do: packed, sequence n's chunk c stands in slot cu_seqlens[n] // L + n + c of T // L + N_seq.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ._shapes import (
    Shape,
    as_float,
    check_chunk_size,
    check_null_slot,
    chunks,
    expect_dtype,
    expect_positive,
    expect_rank,
    expect_same_dtype,
    expect_shape,
    format_shape,
    given_arguments,
    sequences,
)
from ._shapes import check_flag as check_flag
from ._shapes import check_precision as check_precision

CHUNK_LOCAL_CUMSUM: tuple[str, ...] = ("g", "cu_seqlens")
CHUNK_SCALED_DOT_KKT: tuple[str, ...] = ("k", "beta", "g", "cu_seqlens")
SOLVE_TRIL: tuple[str, ...] = ("A", "cu_seqlens")
RECOMPUTE_W_U: tuple[str, ...] = ("k", "v", "beta", "A", "g", "cu_seqlens")
CHUNK_DELTA_H: tuple[str, ...] = ("k", "w", "u", "g", "initial_state", "cu_seqlens")
CHUNK_O: tuple[str, ...] = ("q", "k", "v", "h", "g", "cu_seqlens")
COMBINED: tuple[str, ...] = ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens")
RECURRENT: tuple[str, ...] = (
    "q", "k", "v", "g", "beta", "state", "A_log", "dt_bias",
    "state_indices", "dst_state_indices", "cu_seqlens", "num_accepted_tokens",
)  # fmt: skip
_INDICES = ("cu_seqlens", "state_indices", "dst_state_indices", "num_accepted_tokens")

CHUNK_SIZES = (16, 32, 64)
GATE_BASES = ("e", "2")
STATE_LAYOUTS = ("KV", "VK")
MAX_K = 256
"""A program holds whole columns of the state."""


@dataclass(frozen=True)
class Dims:
    """The sizes of a legal call; 0 where a stage does not have them."""

    B: int
    """Batch rows; 1 when packed."""
    T: int
    """Tokens of a batch row."""
    H_k: int
    """Query and key heads."""
    H_v: int
    """Value heads, a multiple of H_k: value head h reads key head h // (H_v // H_k)."""
    K: int
    V: int
    L: int
    """Chunk size."""
    NC: int
    """Chunks of a batch row; packed, slots for chunks."""
    N_seq: int
    """Sequences: B of them without cu_seqlens."""
    packed: bool


@dataclass(frozen=True)
class RecurrentDims:
    """The sizes of a legal call of `fused_recurrent_gated_delta_rule`."""

    S: int
    """State slots."""
    T: int
    """Tokens, over all sequences."""
    N_seq: int
    """Sequences: T of them without cu_seqlens."""
    H_k: int
    H_v: int
    K: int
    V: int
    T_max: int
    """Slots of a sequence in speculative decode, else 1."""


def check_gate_base(gate_base: object) -> str:
    if gate_base not in GATE_BASES:
        raise ValueError(f"gate_base: expected 'e' or '2', got {gate_base!r}")
    return str(gate_base)


def check_state_layout(state_layout: object) -> str:
    if state_layout not in STATE_LAYOUTS:
        raise ValueError(f"state_layout: expected 'KV' or 'VK', got {state_layout!r}")
    return str(state_layout)


def check_scale(scale: object, K: int) -> float:
    """`scale`, or K^-0.5 for None."""
    if scale is None:
        return K**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
    scale = as_float(scale)
    if not abs(scale) < float("inf"):  # False for NaN
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return scale


def check_chunk_local_cumsum(
    shapes: Mapping[str, Shape | None], dtypes: Mapping[str, str | None], *, chunk_size: object
) -> Dims:
    given = given_arguments(CHUNK_LOCAL_CUMSUM, shapes, dtypes, integers=_INDICES)
    expect_rank("g", given["g"], "B T H_v")
    B, T, H_v = given["g"]
    return _dims(given, "g", B, T, 0, H_v, 0, 0, _chunk_size(chunk_size))


def check_chunk_scaled_dot_kkt(
    shapes: Mapping[str, Shape | None], dtypes: Mapping[str, str | None], *, chunk_size: object
) -> Dims:
    given = given_arguments(CHUNK_SCALED_DOT_KKT, shapes, dtypes, integers=_INDICES)
    B, T, H_k, K = _key(given)
    H_v = _per_value_head("beta", given, B, T, H_k)
    _gate(given, dtypes, B, T, H_v)
    return _dims(given, "k", B, T, H_k, H_v, K, 0, _chunk_size(chunk_size))


def check_solve_tril(shapes: Mapping[str, Shape | None], dtypes: Mapping[str, str | None]) -> Dims:
    given = given_arguments(SOLVE_TRIL, shapes, dtypes, integers=_INDICES)
    B, T, H_v, L = _triangle(given, dtypes)
    return _dims(given, "A", B, T, 0, H_v, 0, 0, L)


def check_recompute_w_u(shapes: Mapping[str, Shape | None], dtypes: Mapping[str, str | None]) -> Dims:
    given = given_arguments(RECOMPUTE_W_U, shapes, dtypes, integers=_INDICES)
    B, T, H_k, K = _key(given)
    H_v, V = _value("v", given, dtypes, B, T, H_k)
    expect_shape("beta", given["beta"], {"B": B, "T": T, "H_v": H_v})
    expect_rank("A", given["A"], "B T H_v BT")
    L = _chunk_size(given["A"][3])
    expect_shape("A", given["A"], {"B": B, "T": T, "H_v": H_v, "BT": L})
    _gate(given, dtypes, B, T, H_v)
    return _dims(given, "k", B, T, H_k, H_v, K, V, L)


def check_chunk_delta_h(
    shapes: Mapping[str, Shape | None], dtypes: Mapping[str, str | None], *, chunk_size: object
) -> Dims:
    given = given_arguments(CHUNK_DELTA_H, shapes, dtypes, integers=_INDICES)
    B, T, H_k, K = _key(given)
    H_v, V = _value("u", given, dtypes, B, T, H_k)
    expect_shape("w", given["w"], {"B": B, "T": T, "H_v": H_v, "K": K})
    expect_same_dtype("w", "k", dtypes)
    _gate(given, dtypes, B, T, H_v)
    dims = _dims(given, "k", B, T, H_k, H_v, K, V, _chunk_size(chunk_size))
    _initial_state(given, dims)
    return dims


def check_chunk_o(
    shapes: Mapping[str, Shape | None],
    dtypes: Mapping[str, str | None],
    *,
    chunk_size: object,
    state_layout: str = "KV",
) -> Dims:
    given = given_arguments(CHUNK_O, shapes, dtypes, integers=_INDICES)
    B, T, H_k, K = _key(given)
    expect_shape("q", given["q"], {"B": B, "T": T, "H_k": H_k, "K": K})
    expect_same_dtype("q", "k", dtypes)
    H_v, V = _value("v", given, dtypes, B, T, H_k)
    _gate(given, dtypes, B, T, H_v)
    dims = _dims(given, "k", B, T, H_k, H_v, K, V, _chunk_size(chunk_size))
    state = {"K": K, "V": V} if state_layout == "KV" else {"V": V, "K": K}
    expect_shape("h", given["h"], {"B": B, "NC": dims.NC, "H_v": H_v, **state})
    return dims


def check_combined(shapes: Mapping[str, Shape | None], dtypes: Mapping[str, str | None], *, chunk_size: object) -> Dims:
    given = given_arguments(COMBINED, shapes, dtypes, integers=_INDICES)
    B, T, H_k, K = _key(given)
    expect_shape("q", given["q"], {"B": B, "T": T, "H_k": H_k, "K": K})
    expect_same_dtype("q", "k", dtypes)
    H_v, V = _value("v", given, dtypes, B, T, H_k)
    for name in ("g", "beta"):
        expect_shape(name, given[name], {"B": B, "T": T, "H_v": H_v})
    dims = _dims(given, "k", B, T, H_k, H_v, K, V, _chunk_size(chunk_size))
    _initial_state(given, dims)
    return dims


def check_recurrent(
    shapes: Mapping[str, Shape | None], dtypes: Mapping[str, str | None], *, null_slot: object = None
) -> RecurrentDims:
    given = given_arguments(RECURRENT, shapes, dtypes, integers=_INDICES)
    expect_rank("q", given["q"], "T H_k K")
    T, H_k, K = given["q"]
    _check_key("q", given["q"])
    expect_shape("k", given["k"], {"T": T, "H_k": H_k, "K": K})
    expect_rank("v", given["v"], "T H_v V")
    H_v, V = given["v"][1:]
    expect_shape("v", given["v"], {"T": T, "H_v": H_v, "V": V})
    expect_positive("v", given["v"], H_v=H_v, V=V)
    for name in ("k", "v"):
        expect_same_dtype(name, "q", dtypes)
    _divides("v", given["v"], H_k, H_v)
    for name in ("g", "beta"):
        expect_shape(name, given[name], {"T": T, "H_v": H_v})
    expect_rank("state", given["state"], "S H_v K V")
    S = given["state"][0]
    expect_shape("state", given["state"], {"S": S, "H_v": H_v, "K": K, "V": V})
    if S < 1:
        raise ValueError("state: expected at least one slot, got S=0")
    if "dt_bias" in given and "A_log" not in given:
        raise ValueError("dt_bias: expected None without A_log, for it is a part of the gate that A_log asks for")
    for name in ("A_log", "dt_bias"):
        if name in given:
            expect_shape(name, given[name], {"H_v": H_v})
    N_seq = T
    if "cu_seqlens" in given:
        expect_rank("cu_seqlens", given["cu_seqlens"], "N_seq+1")
        N_seq = given["cu_seqlens"][0] - 1
        if N_seq < 0:
            raise ValueError("cu_seqlens: expected shape (N_seq + 1,) with at least one entry, got (0,)")
    return RecurrentDims(S, T, N_seq, H_k, H_v, K, V, _check_slots(given, N_seq, S, null_slot))


def _check_slots(given: Mapping[str, Shape], N_seq: int, S: int, null_slot: object) -> int:
    """Checks the slot arguments; T_max."""
    source, target = given.get("state_indices"), given.get("dst_state_indices")
    if source is None:
        if "num_accepted_tokens" in given:
            raise ValueError(
                "state_indices: expected shape (N_seq, T_max) with num_accepted_tokens (a slot for every token), got None"
            )
        if target is not None:
            raise ValueError("dst_state_indices: expected None without state_indices")
        if null_slot is not None:
            raise ValueError(f"null_slot: expected None without state_indices, got {null_slot}")
        if S < N_seq:
            raise ValueError(f"state: expected at least one slot for each of {N_seq} sequences, got S={S}")
        return 1
    check_null_slot(null_slot)
    slots = {"N_seq": N_seq}
    if "num_accepted_tokens" in given:
        expect_shape("num_accepted_tokens", given["num_accepted_tokens"], slots)
        if len(source) != 2 or source[0] != N_seq or source[1] < 1:
            raise ValueError(
                f"state_indices: expected shape (N_seq={N_seq}, T_max) with num_accepted_tokens (a slot for every "
                f"token), got {format_shape(source)}"
            )
        slots = slots | {"T_max": source[1]}
    expect_shape("state_indices", source, slots)
    if target is not None:
        expect_shape("dst_state_indices", target, slots)
    return slots.get("T_max", 1)


def _chunk_size(chunk_size: object) -> int:
    return check_chunk_size(chunk_size, CHUNK_SIZES[0], CHUNK_SIZES[-1])


def _dims(given: Mapping[str, Shape], first: str, B: int, T: int, H_k: int, H_v: int, K: int, V: int, L: int) -> Dims:
    N_seq, packed = sequences(given, first, B)
    return Dims(B, T, H_k, H_v, K, V, L, chunks(T, L, N_seq, packed), N_seq, packed)


def _key(given: Mapping[str, Shape]) -> Shape:
    expect_rank("k", given["k"], "B T H_k K")
    _check_key("k", given["k"])
    return given["k"]


def _check_key(name: str, shape: Shape) -> None:
    expect_positive(name, shape, H_k=shape[-2], K=shape[-1])
    if shape[-1] > MAX_K:
        raise ValueError(f"{name}: expected K <= {MAX_K}, got {format_shape(shape)}")


def _value(
    name: str, given: Mapping[str, Shape], dtypes: Mapping[str, str | None], B: int, T: int, H_k: int
) -> tuple[int, int]:
    """(H_v, V)."""
    expect_rank(name, given[name], "B T H_v V")
    H_v, V = given[name][2:]
    expect_shape(name, given[name], {"B": B, "T": T, "H_v": H_v, "V": V})
    expect_positive(name, given[name], H_v=H_v, V=V)
    expect_same_dtype(name, "k", dtypes)
    _divides(name, given[name], H_k, H_v)
    return H_v, V


def _per_value_head(name: str, given: Mapping[str, Shape], B: int, T: int, H_k: int) -> int:
    expect_rank(name, given[name], "B T H_v")
    H_v = given[name][2]
    expect_shape(name, given[name], {"B": B, "T": T, "H_v": H_v})
    _divides(name, given[name], H_k, H_v)
    return H_v


def _divides(name: str, shape: Shape, H_k: int, H_v: int) -> None:
    if H_v < 1 or H_v % H_k:
        raise ValueError(f"{name}: expected H_v to be a multiple of H_k={H_k}, got {format_shape(shape)}")


def _gate(given: Mapping[str, Shape], dtypes: Mapping[str, str | None], B: int, T: int, H_v: int) -> None:
    if "g" in given:
        # Cumulated over a chunk already, where 16 bits would lose what exp makes of it.
        expect_dtype("g", str(dtypes["g"]), ("float32",))
        expect_shape("g", given["g"], {"B": B, "T": T, "H_v": H_v})


def _triangle(given: Mapping[str, Shape], dtypes: Mapping[str, str | None]) -> tuple[int, int, int, int]:
    expect_rank("A", given["A"], "B T H_v BT")
    expect_dtype("A", str(dtypes["A"]), ("float32",))
    B, T, H_v, L = given["A"]
    expect_shape("A", given["A"], {"B": B, "T": T, "H_v": H_v, "BT": _chunk_size(L)})
    return B, T, H_v, L


def _initial_state(given: Mapping[str, Shape], dims: Dims) -> None:
    if "initial_state" in given:
        expect_shape(
            "initial_state", given["initial_state"], {"N_seq": dims.N_seq, "H_v": dims.H_v, "K": dims.K, "V": dims.V}
        )
