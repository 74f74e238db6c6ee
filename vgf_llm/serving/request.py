"""A request with everything decided: the server's defaults filled in, its limits kept, the prompt in tokens."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from vgf_llm.answering.implicit_policy import Selection
from vgf_llm.data.encoding import EncodedPrompt, encode_prompt, encode_text
from vgf_llm.errors import DataError, SettingError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.serving.errors import RequestError, refused
from vgf_llm.serving.schema import BUDGET_FIELDS, ChatBody, CompletionBody, RequestBody
from vgf_llm.serving.settings import LIMITED, ServeSettings
from vgf_llm.settings import DecoderName, SamplingSettings

_SEEDS = 2**53  # of a request without one: a number that every JSON reader keeps
_SHOWN = 40  # digits of a number that an error repeats
_COLDEST = 0.01  # sampling temperature above 0; below it logits leave float32
_SCALES = (1e-6, 1e6)  # of step size, temperature and bandwidth: what float32 carries through a flow
_CHARACTERS = 64  # of a token: longer ones are runs of blanks or of one letter
_SPENDING = ("prior", "block")  # decoders that nats 0 leave at the samples


@dataclass(frozen=True)
class AnswerRequest:
    """What is to be answered.

    Attributes:
        asked: The body.
        prompt: Token ids; none until they are encoded.
        sampling: The reference distribution; its temperature is that of the server where ``greedy``.
        greedy: Whether the most probable token is taken at each place.
        budget: Transport budget; the empty one is best-of-N.
        num_particles: Responses that are sampled, at least 1.
        draws: Texts of each moved one, at least 1.
        decoder: Name of the decoder.
        select: How the answer is picked from the pool.
        seed: The answer depends on it, the prompt and these settings alone.
        stop: Strings that end the text and are not part of it.
        timeout_sec: Time from arrival to answer, in seconds.
    """

    asked: RequestBody
    prompt: list[int]
    sampling: SamplingSettings
    greedy: bool
    budget: TransportBudget
    num_particles: int
    draws: int
    decoder: DecoderName
    select: Selection
    seed: int
    stop: tuple[str, ...]
    timeout_sec: float

    @property
    def is_plain(self) -> bool:
        """Whether the engine's own sampler answers: nothing is moved and there is nothing to select from."""
        return self.budget.is_none and self.num_particles == 1

    def echo(self) -> dict[str, Any]:
        """Return the budget that the answer was written under."""
        own = {"num_particles": self.num_particles, "draws": self.draws, "decoder": self.decoder, "select": self.select}
        return {**asdict(self.budget), **own}


class RequestReader:
    """Turns request bodies into questions.

    Args:
        settings: Defaults and limits.
        sampling: The default distribution; its top k is the longest list that the engine reports.
        tokenizer: The model's; used from one thread at a time.
        vocabulary: Tokens of the model.
        positions: Positions of the model; None where it has no limit.
    """

    def __init__(
        self,
        settings: ServeSettings,
        sampling: SamplingSettings,
        tokenizer: Any,
        vocabulary: int,
        positions: int | None,
    ) -> None:
        self.settings, self.sampling, self.tokenizer = settings, sampling, tokenizer
        self.vocabulary, self.positions = vocabulary, positions

    def of(self, asked: RequestBody) -> AnswerRequest:
        """Return what a body asks for, its prompt not encoded yet: that takes time, and so a place.

        Raises:
            RequestError: 400, naming the field that is out of range or over the server's limit.
        """
        given: dict[str, Any] = {} if asked.transport is None else asked.transport.model_dump(exclude_none=True)
        own, limits = self.settings, self.settings.limits
        budget = self._budget(given)
        chosen = {name: given.get(name, getattr(own, name)) for name in ("num_particles", "draws", "decoder", "select")}
        timeout_sec = given.get("timeout_sec", limits.timeout_sec)
        self._check_limits({"steps": budget.steps, "rounds": budget.rounds, "nats": budget.nats, **chosen})
        _at_most("transport.timeout_sec", timeout_sec, limits.timeout_sec)
        if budget.nats == 0 and chosen["decoder"] in _SPENDING:
            budget = replace(budget, steps=0)  # the rest still says how the answer is selected
        stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        question = AnswerRequest(
            asked=asked,
            prompt=[],
            sampling=self._sampling(asked),
            greedy=asked.temperature == 0,
            budget=budget,
            seed=secrets.randbelow(_SEEDS) if asked.seed is None else asked.seed,
            stop=stop,
            timeout_sec=timeout_sec,
            **chosen,
        )
        self._check_together(question)
        return question

    def encoded(self, question: AnswerRequest) -> AnswerRequest:
        """Return a question with its prompt in tokens.

        Raises:
            RequestError: 400, where the prompt is empty, too long, or refused by the chat template.
        """
        return replace(question, prompt=self._prompt(question.asked, question.sampling.max_new_tokens))

    def _budget(self, given: dict[str, Any]) -> TransportBudget:
        merged = {**asdict(self.settings.budget), **{name: given[name] for name in BUDGET_FIELDS if name in given}}
        try:
            budget = TransportBudget(**merged)
        except SettingError as error:
            raise refused(f"transport.{error.key}", f"transport.{error}") from error
        for name in ("step_size", "temperature", "bandwidth"):
            if name in given and not _SCALES[0] <= given[name] <= _SCALES[1]:
                raise refused(
                    f"transport.{name}",
                    f"transport.{name} must be {_SCALES[0]:g} to {_SCALES[1]:g}, got {str(given[name])[:_SHOWN]}",
                )
        return budget

    def _check_limits(self, values: dict[str, Any]) -> None:
        for name in (key.rpartition(".")[2] for key in LIMITED):
            _at_most(f"transport.{name}", values[name], getattr(self.settings.limits, name))

    def _sampling(self, asked: RequestBody) -> SamplingSettings:
        own = self.sampling
        tokens, name = asked.max_tokens, "max_tokens"
        if isinstance(asked, ChatBody) and asked.max_completion_tokens is not None:
            if tokens is not None:
                raise refused("max_tokens", "max_tokens and max_completion_tokens are both set; give one of them")
            tokens, name = asked.max_completion_tokens, "max_completion_tokens"
        tokens = own.max_new_tokens if tokens is None else tokens
        _at_most(name, tokens, self.settings.limits.max_tokens)
        if asked.temperature is not None and 0 < asked.temperature < _COLDEST:
            raise refused("temperature", f"temperature must be 0 or at least {_COLDEST}, got {asked.temperature}")
        return SamplingSettings(
            temperature=asked.temperature or own.temperature,
            top_k=own.top_k if asked.top_k is None else asked.top_k,
            top_p=own.top_p if asked.top_p is None else asked.top_p,
            max_new_tokens=tokens,
        )

    def _check_together(self, question: AnswerRequest) -> None:
        """Refuse what only the engine's own sampler can do where it is not the one that answers."""
        if question.is_plain:
            return
        plain = 'only transport {"steps": 0, "num_particles": 1} can'
        if question.greedy:
            raise refused("temperature", f"temperature must be above 0 where particles are sampled, got 0; {plain}")
        if not 1 <= question.sampling.top_k <= self.sampling.top_k:
            raise refused(
                "top_k",
                f"top_k must be 1 to {self.sampling.top_k} where particles are sampled, got {question.sampling.top_k}; "
                f"{plain} do without",
            )
        if question.decoder == "stream" and not question.budget.is_none:
            raise refused(
                "transport.decoder", "transport.decoder must not be stream: it does not write in the engine yet"
            )
        if question.stop and question.decoder != "prior" and not question.budget.is_none:
            raise refused("stop", f"stop needs transport.decoder prior, got {question.decoder}: others write in pieces")

    def _prompt(self, asked: RequestBody, new_tokens: int) -> list[int]:
        room = self.settings.limits.prompt_tokens
        if self.positions is not None:
            room = max(min(room, self.positions - new_tokens), 0)
        _check_characters(asked, room)
        if isinstance(asked, ChatBody):
            name, found = "messages", self._encoded("messages", encode_prompt, [one.plain for one in asked.messages])
        else:
            assert isinstance(asked, CompletionBody)
            name = "prompt"
            given = asked.prompt
            if isinstance(given, str):
                found = EncodedPrompt(self._encoded(name, encode_text, given), given)
            else:
                found = list(given)
        if not found:
            raise refused(name, f"{name} has no tokens")
        if max(found) >= self.vocabulary:
            raise refused(name, f"{name} holds token {max(found)}; the model knows 0 to {self.vocabulary - 1}")
        if len(found) > room:
            raise RequestError(
                400,
                f"{name} has {len(found)} tokens and may have {room} with {new_tokens} new ones; shorten it",
                param=name,
                code="context_length_exceeded",
            )
        return found

    def _encoded(self, name: str, encode: Callable[[Any, Any], list[int]], prompt: Any) -> list[int]:
        try:
            return encode(self.tokenizer, prompt)
        except DataError as error:
            raise refused(name, f"{name}: {error}") from error


def _check_characters(asked: RequestBody, room: int) -> None:
    """Refuse a text that no tokenizer makes short enough, before one has worked on it."""
    if isinstance(asked, ChatBody):
        name, characters = "messages", sum(len(one.plain["content"]) for one in asked.messages)
    else:
        assert isinstance(asked, CompletionBody)
        name, characters = "prompt", len(asked.prompt) if isinstance(asked.prompt, str) else 0
    most = _CHARACTERS * room
    if characters > most:
        raise RequestError(
            400,
            f"{name} has {characters} characters, more than {most} for {room} tokens; shorten it",
            param=name,
            code="context_length_exceeded",
        )


def _at_most(param: str, value: float, most: float) -> None:
    if value > most:
        seen = f"{value:g}" if isinstance(value, float) else str(value)[:_SHOWN]
        raise refused(param, f"{param} must be at most {most:g} here, got {seen}")
