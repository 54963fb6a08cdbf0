"""Other people's implementations: they take part when they can be imported, and are named as missing when not."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parity_tests.cases import Case

XLA_TOKENS = 8192
"""Up to here peers in plain JAX are measured: XLA compiles every length anew, and they hold much in memory."""


@dataclass(frozen=True)
class Peer:
    """`adapt(function, tensors, out, **scalars)` gives a call of `function` the way its users call it.

    The call returns y where it updates our own operands, else its results by name: those that it has in our layout.
    What its users prepare once and not in every layer, `adapt` prepares. A peer in JAX is traced: `adapt(function, arrays,
    **scalars)` gives the results themselves, in the order in which our own function returns them.
    """

    name: str
    module: str
    function: str
    adapt: Callable[..., Any]
    takes: Callable[[Case], bool] = lambda case: True
    """Whether the case is one that it is made for."""
    autotunes: bool = False
    """Whether its first call measures."""
    slack: float = 10.0
    """How many tolerances it may be off by: it has rounding points of its own (a softplus without its low bits, for one)."""

    framework: str = "torch"

    @property
    def implementation(self) -> str:
        return f"peer:{self.name}"

    def load(self) -> Callable[..., Any]:
        """The function, or ImportError."""
        module = importlib.import_module(self.module)
        try:
            return getattr(module, self.function)
        except AttributeError as error:
            raise ImportError(f"{self.module} has no {self.function}") from error

    def version(self) -> str:
        return getattr(importlib.import_module(self.module.partition(".")[0]), "__version__", "unknown")


def find(peers: tuple[Peer, ...]) -> tuple[dict[Peer, Callable[..., Any]], dict[Peer, str]]:
    """(those that import, with their function; those that do not, with the reason)."""
    present: dict[Peer, Callable[..., Any]] = {}
    missing: dict[Peer, str] = {}
    for peer in peers:
        try:
            present[peer] = peer.load()
        except ImportError as error:
            missing[peer] = f"{type(error).__name__}: {error}"
    return present, missing
