"""The work for one request: sample, transport, decode, select, and say what it came to.

Runs in as many threads as requests are worked on. The answer depends on the question alone, never on what is served
beside it: its noise is hashed from its own seed, and its texts are rows of their own in the engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgf_llm.answering.answer import outcome_rows
from vgf_llm.answering.assemble import make_policy
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.answering.pipeline import Pipeline
from vgf_llm.engines.deadline import Deadline
from vgf_llm.engines.engine import Engine, EngineRequest
from vgf_llm.engines.engine_reference import EngineReference
from vgf_llm.models.architecture import max_positions, vocabulary_rows
from vgf_llm.serving.guards import Guard, GuardedEngine, GuardedValue, guarded_gradient
from vgf_llm.serving.request import AnswerRequest, RequestReader
from vgf_llm.serving.settings import ServeSettings
from vgf_llm.serving.stopping import StoppedPolicy, StoppedValue, cut
from vgf_llm.text import row_seeds
from vgf_llm.text.decoders.make import make_decoder
from vgf_llm.text.particles import token_spacing
from vgf_llm.text.protocols import check_no_kernel
from vgf_llm.text.responses import Responses
from vgf_llm.text.sampler import ReferenceSampler, Sampler

_WITH_KERNEL = ("prior", "block", "nearest")


@dataclass(frozen=True)
class Answer:
    """What a client gets.

    Attributes:
        text: The response, without what stopped it.
        finish_reason: ``stop`` where the text ended by itself or at a stop string, ``length`` where it was cut.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens of the response, its EOS and what stopped it included.
        transport: Values, distance, seed, seconds and budget.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    transport: dict[str, Any]


class Service:
    """One value model and whatever engine is running, as an answerer of questions.

    Args:
        pipeline: The value with its gradient, the tokenizer, and the distribution and shape of the base model.
        settings: Defaults and limits.
        engine: Returns the engine that is running; raises where there is none.
    """

    def __init__(
        self, pipeline: Pipeline[EngineReference], settings: ServeSettings, engine: Callable[[], Engine]
    ) -> None:
        self.pipeline, self.settings, self.engine = pipeline, settings, engine
        reference, config = pipeline.reference, pipeline.reference.model.config
        positions = max_positions(config)
        if positions is not None:
            positions -= reference.reserved_positions
        rows = min(vocabulary_rows(config), len(pipeline.value.embedding_table_VD))
        self.questions = RequestReader(settings, reference.sampling, pipeline.tokenizer, rows, positions)
        self._length_unit = token_spacing(pipeline.value.embedding_table_VD)
        self._turn, self._tokenizer_turn = threading.Lock(), threading.Lock()
        self._check_default_decoder()

    def encoded(self, question: AnswerRequest, deadline: Deadline) -> AnswerRequest:
        """Return a question with its prompt in tokens; see :meth:`vgf_llm.serving.request.RequestReader.encoded`.

        Raises:
            AbandonedError: If the caller has left.
            DeadlineError: If their time is up.
        """
        deadline.check()
        with self._tokenizer_turn:  # a fast tokenizer may be read by several threads, but not set up
            return self.questions.encoded(question)

    def _check_default_decoder(self) -> None:
        """Find out at the start, and not with the first request, that the decoder refuses its options or budget.

        Raises:
            ConfigError: Naming the option.
        """
        own = self.settings
        make_decoder(own.decoder, self.pipeline.reference, self.pipeline.value, own.decoder_options)
        if own.decoder not in _WITH_KERNEL and not own.budget.is_none:
            check_no_kernel(own.decoder, own.budget)

    def answer(self, question: AnswerRequest, deadline: Deadline, waited_sec: float = 0.0) -> Answer:
        """Answer a question.

        Args:
            question: What is asked.
            deadline: The caller's patience.
            waited_sec: Seconds that the request has waited for its place.

        Raises:
            AbandonedError: If the caller has left.
            DeadlineError: If their time is up.
            EngineError: If the engine died or hangs.
            VGFError: If the decoder refuses the budget, or a value is not finite.
        """
        started, guard = time.monotonic(), Guard(deadline, self._turn)
        policy = self._policy(question, guard)
        outcome = policy([question.prompt], row_seeds(question.seed, [0], question.num_particles))
        with self._tokenizer_turn:
            (row,) = outcome_rows([""], outcome, self.pipeline.tokenizer)
        text, was_stopped = cut(row["response"], question.stop)
        seconds = {"queue": waited_sec, **guard.seconds, "total": waited_sec + time.monotonic() - started}
        return Answer(
            text=text,
            finish_reason="stop" if row["ended"] or was_stopped else "length",
            prompt_tokens=len(question.prompt),
            completion_tokens=int(outcome.selected.lengths_BN),
            transport={
                "value": row["value"],
                "original_value": row["original_value"],
                "mean_original_value": round(float(outcome.original_values_BN.mean()), 4),
                "original": cut(row["original"], question.stop)[0],
                "source": cut(row["source"], question.stop)[0],
                "source_value": row["source_value"],
                "rounds": row["rounds"],
                **row["distance"],
                "seed": question.seed,
                "budget": question.echo(),
                "seconds": {name: round(sec, 4) for name, sec in seconds.items()},
            },
        )

    def _policy(self, question: AnswerRequest, guard: Guard) -> ImplicitPolicy:
        """Return the policy that this request asks for; it shares weights and engine with all others."""
        own, engine = self.pipeline, self.engine()
        value = GuardedValue(own.value, guard)
        if question.stop:
            value = StoppedValue(value, own.tokenizer, self._tokenizer_turn, question.stop)
        sampling = GuardedEngine(engine, guard, "sample")
        sampler: Sampler = PlainSampler(sampling, own.reference, question)
        distribution = own.reference  # of no account where nothing is moved
        if not question.is_plain:
            sampler = ReferenceSampler(self._distribution(question, sampling))
            distribution = self._distribution(question, GuardedEngine(engine, guard, "decode"))
        return make_policy(
            StoppedPolicy if question.stop else ImplicitPolicy,
            distribution,
            value,
            question.budget,
            question.decoder,
            self.settings.decoder_options if question.decoder == self.settings.decoder else {},
            draws=question.draws,
            select=question.select,
            gradient=guarded_gradient(own.gradient, guard),
            length_unit=self._length_unit,
            sampler=sampler,
        )

    def _distribution(self, question: AnswerRequest, engine: Engine) -> EngineReference:
        like = self.pipeline.reference
        return EngineReference(
            engine,
            like.model,
            question.sampling,
            like.eos_ids,
            like.pad_id,
            like.device,
            like.adapter,
            question.stop,
            like.vocabulary,
        )


class PlainSampler:
    """The engine's own sampler for one question, seeded by the question's seed; no plan picks a token.

    Args:
        engine: Writes.
        like: Says how a text ends and is padded.
        question: Prompt, distribution and seed.
    """

    def __init__(self, engine: Engine, like: EngineReference, question: AnswerRequest) -> None:
        self.engine, self.like, self.question = engine, like, question

    def sample(self, prompts: list[list[int]], seeds_BN: Tensor) -> Responses:
        """Return one response; see :class:`vgf_llm.text.sampler.Sampler`."""
        own, like = self.question, self.like
        request = EngineRequest(
            own.prompt,
            own.sampling.max_new_tokens,
            sampling=None if own.greedy else own.sampling,
            seed=own.seed,
            eos_ids=like.eos_ids,
            stop=own.stop,
            adapter=like.adapter,
            barred=like.barred,
        )
        (text,) = self.engine.run([request])
        tokens_BNT = torch.tensor([[text.tokens]], device=like.device)
        return Responses(prompts, tokens_BNT, torch.ones_like(tokens_BNT).bool(), like.eos_ids, like.pad_id)
