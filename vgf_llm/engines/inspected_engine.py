"""An engine whose texts are shown to an inspector before the caller gets them, for a proof of its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vgf_llm.engines.deadline import Deadline
from vgf_llm.engines.engine import EngineRequest, EngineText, TakesWeights

Inspect = Callable[[Sequence[EngineRequest], Sequence[EngineText]], None]
"""(requests, the text of each): looks at what was written, and raises where that must not be used."""


class InspectedEngine:
    """An engine that takes weights, inspected; see :class:`vgf_llm.engines.engine.TakesWeights`.

    Args:
        engine: Writes and reads.
        inspect: Called after each call that wrote something, with what was written. It is not shown what the engine
            read for its log-probabilities. What it raises reaches the caller in place of the texts.
    """

    def __init__(self, engine: TakesWeights, inspect: Inspect) -> None:
        self.name, self._engine, self._inspect = engine.name, engine, inspect

    def run(self, requests: Sequence[EngineRequest], deadline: Deadline | None = None) -> list[EngineText]:
        """Return the result of each request, in order, once the inspector has seen what was written."""
        texts = self._engine.run(requests, deadline)
        written = [pair for pair in zip(requests, texts, strict=True) if pair[0].prompt_logprobs is None]
        if written:
            self._inspect([request for request, _ in written], [text for _, text in written])
        return texts

    def check(self) -> None:
        """Do nothing while the engine can be used."""
        self._engine.check()

    def push_adapter(self, folder: str | Path) -> str:
        """Load a LoRA in place of the one before."""
        return self._engine.push_adapter(folder)

    def push_weights(self, folder: str | Path) -> None:
        """Replace all weights by a folder's."""
        self._engine.push_weights(folder)

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()
