"""`override(...)`: pin launch knobs for a block of code, ahead of every table.

Overrides live in a context variable: they are local to a thread (or an asyncio task), nest, and end with their block.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from .spec import TWINS, Knobs, Value, check_knobs
from .specs import get_spec


@dataclass(frozen=True)
class Override:
    """One active `override(...)` block."""

    op: str
    twin: str | None
    items: tuple[tuple[str, Value], ...]


Token = tuple[Override, ...]
Hook = Callable[[Token], AbstractContextManager]

_active: ContextVar[Token | None] = ContextVar("ssm_configs.override", default=None)
_hooks: list[Hook] = []


@contextmanager
def override(op: str, *, twin: str | None = None, **knobs: Value) -> Iterator[None]:
    """Launch `op` with these knobs inside the `with` block, whatever the tables say.

    With `twin=None` they are shared knobs and serve both packages: Triton as they stand, Pallas through the op's rule.
    With "triton" or "pallas" they are that twin's own knobs, and the other twin keeps its config.
    Knobs that are not given are filled from what the look-up would give outside the block; inner blocks win over outer
    ones. Values are checked on entry, and against the static sizes when a look-up knows those.
    """
    spec = get_spec(op)
    if twin is not None and twin not in TWINS:
        raise ValueError(f"twin: got {twin!r}, expected None or one of {TWINS}")
    if not knobs:
        raise ValueError(f"override({op!r}): expected at least one knob")
    try:
        check_knobs(spec.knobs if twin is None else spec.knobs_of(twin), knobs, complete=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"override({op!r}): {error}") from None

    token = (*(_active.get() or ()), Override(op, twin, tuple(sorted(knobs.items()))))
    with ExitStack() as stack:
        stack.callback(_active.reset, _active.set(token))
        for hook in tuple(_hooks):
            stack.enter_context(hook(token))
        yield


def override_token() -> Token | None:
    """All active overrides, outermost first, as one hashable value (equal blocks give equal ones); None without any."""
    return _active.get()


def on_override(hook: Hook) -> Callable[[], None]:
    """Enter `hook(token)` together with every override from now on; returns a function that removes the hook.

    It lets a compiler that caches by its own context (`jax.make_user_context`) see the token. A hook registered inside
    an active block would miss that block, and what is compiled there would be found again outside: that is a
    `RuntimeError`. So a package registers when it is imported, and is imported before the first override.
    """
    if _active.get() is not None:
        raise RuntimeError(
            "on_override: called inside an active override(...), which the hook would miss; call it before"
        )
    _hooks.append(hook)
    return lambda: _hooks.remove(hook)


def merge(token: Token | None, op: str, twin: str) -> tuple[Knobs, Knobs]:
    """What the active overrides say for one look-up: pinned shared knobs, and pinned knobs of `twin` on top."""
    shared: Knobs = {}
    own: Knobs = {}
    for block in token or ():
        if block.op != op:
            continue
        if block.twin is None:
            shared |= block.items
            # Triton's knobs are the shared ones. Pallas' follow from them, so what an outer block pinned is gone.
            own = own | dict(block.items) if twin == "triton" else {}
        elif block.twin == twin:
            own |= block.items
    return shared, own
