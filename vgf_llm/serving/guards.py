"""What one request puts in front of the things that requests share: its patience, its stopwatch, and its turn.

The engine is shared as it is, since it batches. The value model is one torch model on one device: requests take turns,
a stage at a time. Between stages a request whose caller has left or whose time is up ends.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from vgf_llm.engines.deadline import Deadline
from vgf_llm.engines.engine import Engine, EngineRequest, EngineText
from vgf_llm.flow.trajectory import ValueGradient
from vgf_llm.text.particles import GradientSource
from vgf_llm.text.protocols import Value
from vgf_llm.text.responses import Responses

_LOOK_SEC = 0.1


class Guard:
    """One request's patience and stopwatch.

    Args:
        deadline: The caller's patience.
        turn: Held by the request whose stage runs on the value model.

    Attributes:
        seconds: Time spent in each stage so far, by name.
    """

    def __init__(self, deadline: Deadline, turn: threading.Lock) -> None:
        self.deadline, self.turn = deadline, turn
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage.

        Raises:
            AbandonedError: If the caller has left.
            DeadlineError: If their time is up.
        """
        self.deadline.check()
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - started

    @contextmanager
    def turn_at(self, name: str) -> Iterator[None]:
        """Time a stage on the value model, the wait for the turn included; errors as for :meth:`stage`."""
        with self.stage(name):
            while not self.turn.acquire(timeout=_LOOK_SEC):
                self.deadline.check()
            try:
                yield
            finally:
                self.turn.release()


class GuardedEngine:
    """An engine as one stage of one request asks it; see :class:`vgf_llm.engines.engine.Engine`."""

    def __init__(self, engine: Engine, guard: Guard, stage: str) -> None:
        self.name, self._engine, self._guard, self._stage = engine.name, engine, guard, stage

    def run(self, requests: Sequence[EngineRequest], deadline: Deadline | None = None) -> list[EngineText]:
        """Return what came of each request, under the request's own patience."""
        with self._guard.stage(self._stage):
            return self._engine.run(requests, deadline or self._guard.deadline)

    def check(self) -> None:
        """Do nothing while the engine can be used."""
        self._engine.check()

    def close(self) -> None:
        """Nothing: others use the engine."""


class GuardedValue:
    """A value as one request asks it; see :class:`vgf_llm.text.protocols.Value`."""

    def __init__(self, value: Value, guard: Guard) -> None:
        self.own, self.guard = value, guard

    @property
    def embedding_table_VD(self) -> Tensor:
        """The input embeddings that particles live in."""
        return self.own.embedding_table_VD

    def prefix(self, prompts: list[list[int]]) -> Any:
        """Run prompts once."""
        with self.guard.turn_at("score"):
            return self.own.prefix(prompts)

    def embed(self, tokens: Tensor) -> Tensor:
        """Look tokens up in the table."""
        return self.own.embed(tokens)

    def score(self, prefix: Any, responses: Tensor, mask_BNT: Tensor) -> Tensor:
        """Return values [B, N]."""
        with self.guard.turn_at("score"):
            return self.own.score(prefix, responses, mask_BNT)


def guarded_gradient(gradient: GradientSource, guard: Guard) -> GradientSource:
    """Return a source of directions that takes its turn for every step; for a :class:`GuardedValue`."""

    def make(value: Value, prefix: Any, responses: Responses) -> ValueGradient:
        own = value.own if isinstance(value, GuardedValue) else value  # the step takes the turn itself
        step = gradient(own, prefix, responses)

        def guarded(u_BNTD: Tensor) -> tuple[Tensor, Tensor]:
            with guard.turn_at("transport"):
                return step(u_BNTD)

        return guarded

    return replace(gradient, make=make)
