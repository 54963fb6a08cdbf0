"""A process that compiles programs for `warmup` and stores them: `python -m pallas_ssm._warmup_child`, which only it starts.

Reads pickles from its standard input, a `Start` and then requests (file name, op, options, shapes), and answers each request
with a line of JSON: what went wrong ("error", else null) and which tables it warned of ("warnings").
"""

import gc
import json
import os
import pickle
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

import ssm_configs

from ._stored_programs import Store, digest_circumstances, name_of
from ._warmup_jitted import jitted

Request = tuple[str, str, dict[str, Any], dict[str, tuple[tuple[int, ...], str]]]


@dataclass(frozen=True)
class Start:
    folder: str
    settings: Mapping[str, Any]
    """Of `jax.config`."""
    platform: str
    index: int
    """Of the device among those of its platform."""


def main() -> None:
    # To look through all modules' objects again and again took up to a tenth of the time, and found nothing.
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)
    # Whatever else prints must not get between the answers.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        start = pickle.load(sys.stdin.buffer)
        values = jax.config.values
        for name, value in start.settings.items():
            # What this process does not know came with a module that it has not imported.
            if name in values and values[name] != value:
                jax.config.update(name, value)
        jax.config.update("jax_enable_compilation_cache", False)  # see `without_jax_cache`
        device = jax.devices(start.platform)[start.index]
        jax.config.update("jax_default_device", device)
        store, circumstances = Store(start.folder), digest_circumstances(device)
        while True:
            try:
                request = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            print(json.dumps(_answer(store, circumstances, request)), file=answers, flush=True)


def _answer(store: Store, circumstances: str | None, request: Request) -> dict[str, Any]:
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _make(store, circumstances, *request)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
    missing = [str(warning.message) for warning in caught if issubclass(warning.category, ssm_configs.TableWarning)]
    return {"error": error, "warnings": missing}


def _make(store: Store, circumstances: str | None, name: str, op: str, options: dict[str, Any], shapes: Any) -> None:
    function = jitted(op, **options)
    structs = {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype) in shapes.items()}
    # A program made under other settings or tables would be filed as one that it is not.
    if circumstances is None or name_of(function, structs, circumstances) != name:
        raise RuntimeError("this process would make another program")
    store.save(name, function.lower_anew(structs).compile())


if __name__ == "__main__":
    main()
