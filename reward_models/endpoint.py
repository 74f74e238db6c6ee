"""Rewards from a server with OpenAI's or vLLM's interface: a reward model that scores, or a chat model that judges.

| kind | request | reward |
|---|---|---|
| ``judge`` | ``POST /v1/chat/completions``, the text of a template | the number that is parsed from the answer |
| ``classify`` | ``POST /classify``, the conversation with the response | the output before its activation |
| ``pooling`` | ``POST /pooling``, the same | the output at the last token |
| ``score`` | ``POST /score``, conversation and response as a pair | the score of a cross-encoder |

URL and key come from environment variables whose names are settings; neither is written to a log, a file or an error.
One request per response: as many are under way as the caller asks for, and the server batches them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from reward_models.endpoint_answers import found_in, number_in, number_pattern, weighted
from reward_models.endpoint_server import TIMEOUT_SEC, EndpointServer
from vgf_llm.data.dialogue import Message, conversation_text
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.runs.files import shorten

EndpointKind = Literal["judge", "classify", "pooling", "score"]

_OWN = ("messages", "prompt", "response", "row")  # of a template


@dataclass(frozen=True)
class EndpointSettings:
    """A server that scores or judges responses."""

    kind: EndpointKind
    """What is asked for: judge, classify, pooling or score."""
    model: str
    """The model's name there."""
    url_variable: str = "REWARD_URL"
    """Environment variable with the server's URL, with or without /v1."""
    key_variable: str = "REWARD_API_KEY"
    """Environment variable with the key; where it is not set none is sent."""
    template: str | None = None
    """File of the judge's prompt, a Jinja template of messages, prompt, response, row, and columns by name."""
    pattern: str | None = None
    """Regular expression whose first group is the judge's number; its last match counts. Null: "score: 7" or
    "score (0-10): 7", or a bare number."""
    max_tokens: int = 512
    """Tokens of the judge's answer, at least 1."""
    temperature: float = 0.0
    """Of the judge, at least 0."""
    outputs: dict[str, float] = field(default_factory=dict)
    """Weights of the outputs of a classifier with several, by number."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template at the server."""
    version: str | None = None
    """Of what the server runs: another one pays anew for rewards in the cache. Null: a digest of the URL."""


READ_BY_KIND: dict[str, tuple[str, ...]] = {
    "judge": ("template", "pattern", "max_tokens", "temperature", "chat_template_kwargs"),
    "classify": ("outputs", "chat_template_kwargs"),
    "pooling": ("outputs", "chat_template_kwargs"),
    "score": (),
}
"""Settings that one kind reads and another does not."""


class EndpointReward:
    """A server's reward of one response, as a function that scores one response per call.

    Args:
        settings: Kind, model, names of the environment variables.
        timeout_sec: Seconds that an answer may take.

    Raises:
        ConfigError: The variable of the URL or key has no usable value, the template cannot be read, or settings do not
            go together.
    """

    per_response = True

    def __init__(self, settings: EndpointSettings, timeout_sec: float | None = None) -> None:
        self.settings, self.timeout_sec = settings, timeout_sec or TIMEOUT_SEC
        self.__name__ = f"{settings.kind}_{re.sub(r'[^A-Za-z0-9_.-]', '_', settings.model)}"
        self.__module__, self.__qualname__ = __name__, self.__name__
        self._server = EndpointServer(settings.url_variable, settings.key_variable, self.timeout_sec)
        self._template, source, read = _template(settings)
        self._pattern = number_pattern(settings.pattern)
        stated = asdict(settings) | {
            "version": settings.version or hashlib.sha256(self._server.url.encode()).hexdigest()
        }
        self.version = hashlib.sha256(json.dumps([stated, source], sort_keys=True).encode()).hexdigest()
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        names = [("messages", kinds[0]), ("response", kinds[0]), *((name, kinds[1]) for name in read)]
        self.__signature__ = inspect.Signature([inspect.Parameter(*one) for one in names])

    def __call__(self, messages: list[Message], response: str, **columns: Any) -> float:
        """Return the reward of a response.

        Args:
            messages: The conversation before it.
            response: The response.
            columns: Those that the template reads.

        Raises:
            ConfigError: The template cannot be filled in with this row.
            ModelError: The server refuses, or its answer was cut or has no number.
            MayPassError: It is busy, broken or not there.
        """
        if self.settings.kind == "judge":
            return self._judged(messages, response, columns)
        if self.settings.kind == "score":
            body = {"text_1": conversation_text(messages), "text_2": response, "use_activation": False}
            return float(found_in(self._post("/score", body), "data", 0, "score"))
        talk = [*messages, {"role": "assistant", "content": response}]
        body = {"messages": talk, "use_activation": False} | self._template_variables
        if self.settings.kind == "classify":
            return self._weighted(found_in(self._post("/classify", body), "data", 0, "probs"))
        rows = found_in(self._post("/pooling", body), "data", 0, "data")
        return self._weighted(rows[-1] if rows and isinstance(rows[-1], list) else rows)

    def _judged(self, messages: list[Message], response: str, columns: dict[str, Any]) -> float:
        prompt = conversation_text(messages)
        text = self._rendered(messages=messages, prompt=prompt, response=response, **columns)
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self.settings.max_tokens,
            "temperature": self.settings.temperature,
        } | self._template_variables
        choice = found_in(self._post("/v1/chat/completions", body), "choices", 0)
        said, reason = found_in(choice, "message", "content"), choice.get("finish_reason")
        if not isinstance(said, str) or not said.strip():
            raise ModelError(f"judge {self.settings.model} answered nothing (it ended by {reason!r}); raise max_tokens")
        if reason == "length":  # the number may be one that is taken back, or half of it
            raise ModelError(
                f"judge {self.settings.model}: its answer was cut after {self.settings.max_tokens} tokens "
                f"({shorten(repr(said), 100)}); raise max_tokens"
            )
        return self.parsed(said)

    def _rendered(self, **values: Any) -> str:
        import jinja2

        try:
            return str(self._template.render(**values))
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"endpoint: '{self.settings.template}' cannot be filled in ({type(error).__name__}: {error})"
            ) from error

    @property
    def _template_variables(self) -> dict[str, Any]:
        variables = self.settings.chat_template_kwargs
        return {"chat_template_kwargs": variables} if variables else {}

    def parsed(self, said: str) -> float:
        """Return the number in a judge's answer.

        Raises:
            ModelError: There is none; the message holds the answer.
        """
        return number_in(said, self._pattern, self.settings.model)

    def _weighted(self, outputs: list[float]) -> float:
        return weighted(outputs, self.settings.outputs, self.settings.model)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._server.post(path, {"model": self.settings.model, **body})


def _template(settings: EndpointSettings) -> tuple[Any, str, list[str]]:
    """Return the judge's template, its text, and the columns that it reads."""
    if settings.kind != "judge":
        return None, "", []
    if settings.template is None:
        raise ConfigError("endpoint: a judge needs a template, the file of its prompt")
    import jinja2
    import jinja2.meta
    import jinja2.sandbox

    try:
        source = Path(settings.template).read_text(encoding="utf-8")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        template = environment.from_string(source)
        read = jinja2.meta.find_undeclared_variables(environment.parse(source))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"endpoint: the template '{settings.template}' cannot be read ({error})") from error
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"endpoint: '{settings.template}', line {error.lineno}: {error.message}") from error
    if "response" not in read:
        raise ConfigError(f"endpoint: '{settings.template}' does not hold {{{{ response }}}}, so it judges nothing")
    return template, source, sorted((read - set(_OWN)) | (read & {"row"}))
