"""What an operator's tuning tables may hold, declared once per operator.

An `OpSpec` names the static keys in a table's file name, says what the digit keys count, and lists the knobs with their
legal values. The loader, the tuner and the docs all read it, so that adding an operator is one declaration.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from .devices import Device

Twin = Literal["triton", "pallas"]
TWINS: tuple[str, ...] = get_args(Twin)

Value = int | bool
Knobs = dict[str, Value]
Statics = Mapping[str, int]


@dataclass(frozen=True)
class Knob:
    """One launch parameter. `legal` holds its values, or is the type `bool`.

    `divides` names a static key that the value must divide, where the kernel has no masked tail.
    """

    name: str
    legal: Collection[int] | type[bool]
    doc: str
    divides: str | None = None
    default: Value | None = None
    """What an entry means that was written before there was this knob; None: every entry must say."""

    def check(self, value: object, statics: Statics | None = None) -> None:
        """Raise `TypeError` or `ValueError` unless `value` is legal (`statics=None`: whatever the static sizes are)."""
        # type(), not isinstance(): a bool is an int to Python, and `"num_warps": true` is a mistake to us.
        expected = bool if self.legal is bool else int
        if type(value) is not expected:
            raise TypeError(f"{self.name}: expected {expected.__name__}, got {value!r} ({type(value).__name__})")
        if isinstance(self.legal, type):
            return
        if value not in self.legal:
            raise ValueError(f"{self.name}: got {value}, expected {_describe(self.legal)}")
        if self.divides is not None and statics is not None and statics[self.divides] % value:
            raise ValueError(f"{self.name}: got {value}, which does not divide {self.divides}={statics[self.divides]}")


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """The tuning-table declaration of one operator.

    A table entry holds every knob of `knobs`, shared by both twins, and may hold an object "triton" or "pallas" with
    every knob of that twin, for what only one twin understands or measures better with another value.
    Without the object, Triton launches with the shared knobs and Pallas with `pallas_rule(shared knobs, statics)`.
    So `triton_knobs` repeats names of `knobs` (perhaps with other legal values), while `pallas_knobs` is free.
    """

    name: str
    static_keys: tuple[str, ...]
    """Sizes that are part of the file name; one compiled kernel serves one tuple of them."""
    dtype_key: str
    dtypes: tuple[str, ...]
    """dtype names a table can carry."""
    dtype_aliases: Mapping[str, str]
    """Other dtype names, with the one whose table they read."""
    size_key: str
    """What the digit keys count, in words."""
    knobs: tuple[Knob, ...]
    triton_knobs: tuple[Knob, ...]
    pallas_knobs: tuple[Knob, ...]
    pallas_rule: Callable[[Mapping[str, Value], Statics], Knobs]
    heuristic: Callable[[Statics, str, Device, int], Knobs]
    """(statics, table dtype, device, size) -> shared knobs, where no table has a say."""
    tuned_at: tuple[str, ...]
    """The dims that an entry's optional "tuned_at" object records."""
    vllm_compatible: bool
    """Whether file name and content are vLLM's, so that `VLLM_TUNED_CONFIG_FOLDER` is searched too."""

    def knobs_of(self, twin: str) -> tuple[Knob, ...]:
        """The knobs that `twin` launches with."""
        return self.triton_knobs if twin == "triton" else self.pallas_knobs

    def launch_knobs(
        self, twin: str, shared: Mapping[str, Value], own: Mapping[str, Value] | None, statics: Statics
    ) -> Knobs:
        """What `twin` launches with, given an entry's shared knobs and its object for that twin, if it has one."""
        if own is not None:
            defaults = {knob.name: knob.default for knob in self.knobs_of(twin) if knob.default is not None}
            return defaults | dict(own)
        return dict(shared) if twin == "triton" else self.pallas_rule(shared, statics)

    def table_dtype(self, dtype: str) -> str:
        """The dtype whose table serves `dtype`."""
        if not isinstance(dtype, str):
            raise TypeError(f"{self.name}: dtype: expected a name as str, got {dtype!r} ({type(dtype).__name__})")
        table_dtype = self.dtype_aliases.get(dtype, dtype)
        if table_dtype not in self.dtypes:
            raise ValueError(
                f"{self.name}: dtype: got {dtype!r}, expected one of {(*self.dtypes, *self.dtype_aliases)}"
            )
        return table_dtype

    def check_statics(self, statics: Mapping[str, object]) -> None:
        """Raise unless `statics` holds exactly the static keys, each a positive int."""
        if statics.keys() != set(self.static_keys):
            raise TypeError(f"{self.name}: expected the static keys {self.static_keys}, got {tuple(statics)}")
        for key, value in statics.items():
            if type(value) is not int:
                raise TypeError(f"{self.name}: {key}: expected int, got {value!r} ({type(value).__name__})")
            if value < 1:
                raise ValueError(f"{self.name}: {key}: got {value}, expected at least 1")


def check_knobs(
    knobs: tuple[Knob, ...], given: Mapping[str, object], statics: Statics | None = None, *, complete: bool = True
) -> None:
    """Raise unless `given` holds legal values for `knobs` and nothing else; `complete`: for every one of them."""
    by_name = {knob.name: knob for knob in knobs}
    if unknown := [name for name in given if name not in by_name]:
        raise ValueError(f"unknown knob {', '.join(map(repr, unknown))}; expected {', '.join(by_name)}")
    if complete and (missing := [knob.name for knob in knobs if knob.name not in given and knob.default is None]):
        raise ValueError(f"missing knob {', '.join(map(repr, missing))}")
    for name, value in given.items():
        by_name[name].check(value, statics)


def _describe(legal: Collection[int]) -> str:
    if isinstance(legal, range):
        return f"{legal.start} to {legal.stop - 1}"
    return f"one of {', '.join(map(str, legal))}"
