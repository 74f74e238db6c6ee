"""What an engine must offer: token ids in, token ids and the reference's log-probabilities out.

An engine is a language model that runs outside this process's torch (vLLM, here or behind a URL). It knows nothing of
transport: what a row is to do comes to it as a plan (:mod:`vgf_llm.text.plans`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from vgf_llm.engines.deadline import Deadline
from vgf_llm.errors import VGFError
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.plans import RowPlan


class EngineError(VGFError):
    """An engine cannot be reached, died, did not answer in time, or does something else than it was asked."""


class RequestRefusedError(EngineError):
    """An engine does not take a request as it is; it goes on with all others."""


@dataclass(frozen=True)
class EngineRequest:
    """One text to be written, or only to be read.

    Attributes:
        prompt: Token ids, what is kept of a response among them.
        max_tokens: Most tokens to write, at least 1.
        plan: Picks the tokens; without one the engine's own sampler does, under ``sampling`` and ``seed``.
        sampling: The distribution for a request without a plan.
        seed: Seed of the engine's own sampler, any whole number.
        eos_ids: Ids that end the text; they stay in it.
        stop: Strings that end the text where they have been written.
        logprobs: Most probable tokens to report at each place that is written; 0 for none.
        prompt_logprobs: The same for each token of the prompt, beside the token itself; None for none at all.
        adapter: LoRA to answer with, by what the engine knows it as; the base model when None.
        barred: Ids that the engine's own sampler never draws: rows that only pad its table. A plan bars its own.
    """

    prompt: list[int]
    max_tokens: int
    plan: RowPlan | None = None
    sampling: SamplingSettings | None = None
    seed: int | None = None
    eos_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int = 0
    prompt_logprobs: int | None = None
    adapter: str | None = None
    barred: range = range(0)

    @property
    def logit_bias(self) -> dict[int, float] | None:
        """The bias that keeps ``barred`` from being drawn, as OpenAI's interface takes it."""
        return dict.fromkeys(self.barred, -100.0) if self.plan is None and self.barred else None


@dataclass(frozen=True)
class TopLogps:
    """Log-probabilities of the untruncated model at temperature 1 at some places, most probable first.

    Attributes:
        own_T: Of the token that stands there.
        ids_TK: int64, the most probable tokens.
        logps_TK: Their log-probabilities, float32.
    """

    own_T: Tensor
    ids_TK: Tensor
    logps_TK: Tensor


@dataclass(frozen=True)
class EngineText:
    """What came of a request.

    Attributes:
        tokens: What was written, its EOS included.
        written: Log-probabilities along it, where they were asked for.
        prompt: Log-probabilities along the prompt from its second token on, where they were asked for.
    """

    tokens: list[int]
    written: TopLogps | None = None
    prompt: TopLogps | None = None


def reported(logps: TopLogps | None, engine: str) -> TopLogps:
    """Return log-probabilities that an engine was asked for.

    Raises:
        EngineError: If it reported none.
    """
    if logps is None:
        raise EngineError(f"the {engine} did not report the log-probabilities that it was asked for")
    return logps


def engine_seed(seed: int | None) -> int | None:
    """Return a seed in the 63 bits that every engine takes; vLLM takes -1 for none, which nothing reproduces."""
    return None if seed is None else seed & (2**63 - 1)


class Engine(Protocol):
    """Writes and reads texts, any number at a time, for any number of threads."""

    name: str

    def run(self, requests: Sequence[EngineRequest], deadline: Deadline | None = None) -> list[EngineText]:
        """Return what came of each request, in order.

        Args:
            requests: What to write or read.
            deadline: The caller's patience; without it they wait as long as the engine lives.

        Raises:
            RequestRefusedError: If the engine does not take one of them.
            EngineError: If it died, or gave no sign of life for too long.
            AbandonedError: If the caller has left; the requests are taken out.
            DeadlineError: If their time is up, likewise.
        """
        ...

    def check(self) -> None:
        """Do nothing while the engine can be used.

        Raises:
            EngineError: If it died, hangs or does not answer.
        """
        ...

    def close(self) -> None:
        """Let go of the engine and its memory."""
        ...


class TakesWeights(Engine, Protocol):
    """An engine whose weights are replaced while it runs. The folder must be one that its processes can read."""

    def push_adapter(self, folder: str | Path) -> str:
        """Load a PEFT adapter in place of the one that was pushed before; returns what requests name it by.

        Args:
            folder: Not one of an adapter that was pushed before: what is cached is known by it.

        Raises:
            EngineError: If the engine refuses it, died, or does not answer in time.
        """
        ...

    def push_weights(self, folder: str | Path) -> None:
        """Replace all weights by those of a model's safetensors, and forget what was cached under the old ones.

        Raises:
            EngineError: As above.
        """
        ...
