"""One implementation on one device: compile configs ahead, check them, time them."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from parity_tests.cases import Case
from ssm_configs.spec import Knobs

from . import gate
from .alone import alone
from .implementations import Implementation, JaxOperands, TorchOperands
from .op import BenchOp, Storage, draw
from .timing import Call, Clock, Sample
from .tuning_log import Config, config_of


class Lab:
    """Holds the operands of one case at a time; buffers are kept from case to case."""

    def __init__(self, op: BenchOp, implementation: Implementation, clock: Clock, storage: Storage):
        self.op, self.implementation, self.clock = op, implementation, clock
        self._storage = storage
        self._compiled: dict[tuple[str, Config | None], Any] = {}
        self._case: Case | None = None
        self._operands: Any = None
        self._initial: dict[str, torch.Tensor] = {}

    def compiled_case(self, case: Case) -> Case:
        """The case to compile for this one."""
        return self.implementation.compiled_case(self.op, case)

    def compile(self, pairs: Sequence[tuple[Case, Knobs | None]]) -> None:
        """In threads. What cannot be compiled raises when it is used."""
        todo = {self._key(case, knobs): (self.compiled_case(case), knobs) for case, knobs in pairs}
        todo = {key: pair for key, pair in todo.items() if key not in self._compiled}

        def attempt(pair: tuple[Case, Knobs | None]) -> Any:
            try:
                return self.implementation.compile(self.op, *pair)
            except Exception as error:
                return error

        # The first one alone: it initialises compilers and drivers, not all of which would stand being raced.
        for key in list(todo)[:1]:
            self._compiled[key] = attempt(todo.pop(key))
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            self._compiled.update(zip(todo, pool.map(attempt, todo.values()), strict=True))

    def forget(self) -> None:
        """Drops compiled programs and operands, keeps buffers."""
        self._compiled.clear()
        self._release()

    def failure(self, case: Case, knobs: Knobs | None) -> str | None:
        """Why this cannot be compiled, or None."""
        self.compile([(case, knobs)])
        compiled = self._compiled[self._key(case, knobs)]
        return _describe(compiled) if isinstance(compiled, Exception) else None

    def check(self, case: Case, knobs: Knobs | None) -> tuple[str | None, dict[str, float]]:
        """(what is wrong or None, relative error of each result) after one call on fresh operands."""
        try:
            call = self.call(case, knobs)
            with alone():
                self._operands.reset()
                call.issue()
                call.wait()
        except torch.AcceleratorError:
            raise  # the context is lost, and with it every later measurement
        except Exception as error:
            return _describe(error), {}
        with alone():
            found = gate.errors(self.op, case, self._initial, self._operands.results())
        wrong = gate.verdict(self.op, case, found, self.implementation.slack)
        return wrong, {name: error.relative for name, error in found.items()}

    def time(self, case: Case, configs: Sequence[Knobs], repeats: int) -> list[Sample]:
        return self.clock.cold_us([self.call(case, knobs) for knobs in configs], repeats)

    def call(self, case: Case, knobs: Knobs | None = None) -> Call:
        """A compiled call on the operands of this case, which are drawn when the case is a new one."""
        self.compile([(case, knobs)])
        compiled = self._compiled[self._key(case, knobs)]
        if isinstance(compiled, Exception):
            raise compiled
        if self._case is not case:
            self._release()
            with alone():
                self._initial = draw(self.op, case, self._storage)
                if self.implementation.framework == "jax":
                    self._operands = JaxOperands(self.op, self._initial)
                else:
                    self._operands = TorchOperands(self.op, case, self._initial, self._storage)
            self._case = case
        return self.implementation.bind(self.op, self._operands, compiled, knobs)

    def _release(self) -> None:
        self._case, self._operands, self._initial = None, None, {}

    def _key(self, case: Case, knobs: Knobs | None) -> tuple[str, Config | None]:
        compiled = self.compiled_case(case)
        return f"{compiled} {compiled.options}", config_of(knobs) if knobs else None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
