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
import http.client
import inspect
import ipaddress
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from reward_models.attempts import MayPassError
from vgf_llm.data.dialogue import Message, conversation_text
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.runs.files import shorten

EndpointKind = Literal["judge", "classify", "pooling", "score"]

_TIMEOUT_SEC = 120.0
_GRACE_SEC = 5.0  # the caller's limit ends a call first; this closes the connection of one that was left behind
_LONGEST_MESSAGE = 300
_MAY_PASS = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_VALUE = r"[-+\u2212]?(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][-+\u2212]?\d++)?+"
_NUMBER = rf"({_VALUE})(?![,.]?\d|[-\u2013\u2014]\d|\s*to\s+\d)"  # not "1,000", and not the start of a range
_RANGE = rf"\s*[(\[][^()\[\]\n]{{0,40}}[)\]]|\s*{_VALUE}\s*(?:[-\u2013\u2014]|to)\s*{_VALUE}"
_SCORE = rf"(?i:score|rating|grade|reward)(?:(?:{_RANGE})(?=\W{{0,4}}?:))?+\W{{0,6}}?(?:is\W{{0,3}}?)?{_NUMBER}"
_PRINTABLE = re.compile(r"[!-~]+")
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


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows none: the key would go along to wherever it leads."""

    def redirect_request(self, *args: Any) -> None:
        return None


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
        self.settings, self.timeout_sec = settings, timeout_sec or _TIMEOUT_SEC
        self.__name__ = f"{settings.kind}_{re.sub(r'[^A-Za-z0-9_.-]', '_', settings.model)}"
        self.__module__, self.__qualname__ = __name__, self.__name__
        self._url = _url(settings)
        _key(settings)
        self._template, source, read = _template(settings)
        self._pattern = _pattern(settings)
        stated = asdict(settings) | {"version": settings.version or hashlib.sha256(self._url.encode()).hexdigest()}
        self.version = hashlib.sha256(json.dumps([stated, source], sort_keys=True).encode()).hexdigest()
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        names = [("messages", kinds[0]), ("response", kinds[0]), *((name, kinds[1]) for name in read)]
        self.__signature__ = inspect.Signature([inspect.Parameter(*one) for one in names])
        self._opener = urllib.request.build_opener(_NoRedirect, *_without_proxy(self._url))

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
            return float(_found(self._post("/score", body), "data", 0, "score"))
        talk = [*messages, {"role": "assistant", "content": response}]
        body = {"messages": talk, "use_activation": False} | self._template_variables
        if self.settings.kind == "classify":
            return self._weighted(_found(self._post("/classify", body), "data", 0, "probs"))
        rows = _found(self._post("/pooling", body), "data", 0, "data")
        return self._weighted(rows[-1] if rows and isinstance(rows[-1], list) else rows)

    def _judged(self, messages: list[Message], response: str, columns: dict[str, Any]) -> float:
        prompt = conversation_text(messages)
        text = self._rendered(messages=messages, prompt=prompt, response=response, **columns)
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self.settings.max_tokens,
            "temperature": self.settings.temperature,
        } | self._template_variables
        choice = _found(self._post("/v1/chat/completions", body), "choices", 0)
        said, reason = _found(choice, "message", "content"), choice.get("finish_reason")
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

    def parsed(self, said: str) -> float:
        """Return the number in a judge's answer.

        Raises:
            ModelError: There is none; the message holds the answer.
        """
        if self._pattern is None:
            bare = re.fullmatch(rf"\W*?{_NUMBER}\W*", said.strip())
            found = [bare[1]] if bare else re.findall(_SCORE, said)
        else:
            found = [match[1] for match in self._pattern.finditer(said)]
        try:
            return float(found[-1].replace("\u2212", "-"))
        except (AttributeError, IndexError, ValueError):  # the group may be None
            wanted = "'score: <number>'" if self._pattern is None else f"{self._pattern.pattern!r}"
            raise ModelError(
                f"judge {self.settings.model}: no number as {wanted} in its answer {shorten(repr(said), 300)}; ask for "
                "it in the template, or set pattern"
            ) from None

    @property
    def _template_variables(self) -> dict[str, Any]:
        variables = self.settings.chat_template_kwargs
        return {"chat_template_kwargs": variables} if variables else {}

    def _weighted(self, outputs: list[float]) -> float:
        """Return the weighted sum of a classifier's outputs."""
        weights = self.settings.outputs
        if not weights and len(outputs) != 1:
            raise ConfigError(
                f"reward model {self.settings.model} has {len(outputs)} outputs; give their weights, for example "
                'outputs: {"0": 1.0}'
            )
        if any(int(number) >= len(outputs) for number in weights):
            raise ConfigError(f"outputs: {self.settings.model} has {len(outputs)} outputs, numbered from 0")
        return sum(w * float(outputs[int(number)]) for number, w in weights.items()) if weights else float(outputs[0])

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """Send a request and return the answer's JSON; whatever is said of it names the variable, not the URL."""
        settings, key = self.settings, _key(self.settings)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = json.dumps({"model": settings.model, **body}).encode()
        server = f"the server of ${settings.url_variable}"
        try:
            request = urllib.request.Request(f"{self._url}{path}", data, headers)
            with self._opener.open(request, timeout=self.timeout_sec + _GRACE_SEC) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = self._without_secrets(error.read().decode(errors="replace"))
            message = f"{server} answers {path} with {error.code}: {shorten(' '.join(said.split()), _LONGEST_MESSAGE)}"
            if error.code in _MAY_PASS:
                raise MayPassError(message, _after_sec(error.headers.get("Retry-After"))) from None
            hint = f"; is ${settings.key_variable} the right key?" if error.code in (401, 403) else ""
            raise ModelError(message + hint) from None
        except ValueError:
            raise ModelError(f"{server} answers {path} with something else than JSON; is it the right URL?") from None
        except http.client.InvalidURL:  # its reason shows the URL
            raise ConfigError(f"endpoint: {server} cannot be asked: the URL there is malformed") from None
        except (OSError, http.client.HTTPException) as error:  # urllib's own are OSErrors
            reason = getattr(error, "reason", None) or error
            message = self._without_secrets(f"{server} cannot be reached: {reason!r}; is it running?")
            raise MayPassError(message) from None

    def _without_secrets(self, text: str) -> str:
        for secret in (os.environ.get(self.settings.key_variable), self._url):
            text = text.replace(secret, "***") if secret else text
        return text


def _url(settings: EndpointSettings) -> str:
    url = os.environ.get(settings.url_variable, "").rstrip("/")
    if not url.startswith(("http://", "https://")):
        state = "does not start with http:// or https://" if url else "is not set"
        raise ConfigError(
            f"endpoint: the environment variable {settings.url_variable} {state}; set it to the server's URL, or name "
            "another as url_variable"
        )
    try:
        parts = urllib.parse.urlsplit(url)
        good = _PRINTABLE.fullmatch(url) and parts.hostname and (parts.port is None or parts.port > 0)
        more = "@" in parts.netloc or bool(parts.query or parts.fragment)
    except ValueError:  # a port that is not a number
        good, more = None, False
    if not good or more:
        fault = "has a user, a query or a fragment in it" if more else "is malformed: a blank, a line break, or no host"
        raise ConfigError(
            f"endpoint: the URL in the environment variable {settings.url_variable} {fault}; set it to "
            f"http(s)://host:port, and put the key into {settings.key_variable}"
        )
    return url.removesuffix("/v1")


def _key(settings: EndpointSettings) -> str | None:
    """Return the key, or None where none is set.

    Raises:
        ConfigError: It has characters that a header cannot have; the message does not show it.
    """
    key = os.environ.get(settings.key_variable)
    if key and not _PRINTABLE.fullmatch(key):
        raise ConfigError(
            f"endpoint: the key in the environment variable {settings.key_variable} has a blank, a line break or a "
            "character outside ASCII; set it to the key alone"
        )
    return key or None


def _without_proxy(url: str) -> list[urllib.request.BaseHandler]:
    """Return what keeps requests to this machine from a proxy, which would look for the server on its own."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        here = False
    return [urllib.request.ProxyHandler({})] if here else []


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


def _pattern(settings: EndpointSettings) -> re.Pattern[str] | None:
    if settings.pattern is None:
        return None
    try:
        found = re.compile(settings.pattern)
    except re.error as error:
        raise ConfigError(f"endpoint: pattern {settings.pattern!r} is not a regular expression: {error}") from error
    if found.groups < 1:
        raise ConfigError(f"endpoint: pattern {settings.pattern!r} needs a group in parentheses, which is the number")
    return found


def _found(answer: Any, *path: str | int) -> Any:
    """Return a value inside an answer.

    Raises:
        ModelError: It is not there.
    """
    found = answer
    try:
        for part in path:
            found = found[part]
    except (LookupError, TypeError):
        raise ModelError(
            f"the server's answer has no {'.'.join(map(str, path))}: {shorten(json.dumps(answer), 200)}; does it serve "
            "this kind of model?"
        ) from None
    return found


def _after_sec(header: str | None) -> float | None:
    try:
        return None if header is None else float(header)
    except ValueError:  # a date
        return None
