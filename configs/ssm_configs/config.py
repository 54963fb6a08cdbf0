"""The launch config that a look-up returns."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .spec import Knobs, Value


@dataclass(frozen=True, eq=False)
class Config(Mapping[str, Value]):
    """Launch knobs by name, and where they come from.

    Equality and hash look at the knobs alone: two table rows with one config share one compiled kernel, also when a
    `Config` is a static argument of `jax.jit`.
    """

    pairs: tuple[tuple[str, Value], ...]
    """The knobs, in the order of their declaration."""
    source: str
    """"override", "SSM_TUNED_CONFIG_FOLDER", "VLLM_TUNED_CONFIG_FOLDER", "shipped" or "heuristic"."""
    path: str | None = None
    """The table that was read, also where an override left knobs open."""
    key: int | None = None
    """The matched size key of that table."""

    @property
    def knobs(self) -> Knobs:
        """The knobs as a new dict."""
        return dict(self.pairs)

    def __getitem__(self, name: str) -> Value:
        for key, value in self.pairs:
            if key == name:
                return value
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (key for key, _ in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __hash__(self) -> int:
        return hash(frozenset(self.pairs))

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.pairs)
