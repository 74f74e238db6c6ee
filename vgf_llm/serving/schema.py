"""The fields of a request and their types: OpenAI's for what is sampled, ``transport`` for how far it is moved.

Strict: an unknown field, text for a number, true for 1, NaN or infinity is refused by name. What OpenAI's interface
has and this server does not do (several answers, penalties, log-probabilities, tools) may be sent with a value that
asks for nothing (neutral.py).
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from vgf_llm.answering.implicit_policy import Selection
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.serving.errors import RequestError
from vgf_llm.serving.neutral import NEUTRAL, OF_A_MESSAGE, OF_A_PART, without_neutral
from vgf_llm.settings import DecoderName
from vgf_llm.settings.keys import field_hints

_SEED = 2**63
_INTEGER = 2**31 - 1  # what every engine and tensor takes
_NAME_SHOWN = 80  # characters of a field's name that an error repeats
_SHOWN = 60  # characters of a value that an error repeats
_BRANCH = re.compile(r"^(str|int|float|list\[.*\])$")  # what pydantic adds to a path where a field has several types


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class TextPart(_Strict):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, body: Any) -> Any:
        return without_neutral(body, OF_A_PART)


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=256, fail_fast=True)]
    name: str | None = Field(None, max_length=256)  # of a participant; templates have no place for it

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, body: Any) -> Any:
        return without_neutral(body, OF_A_MESSAGE)

    @property
    def plain(self) -> dict[str, str]:
        """The turn with its parts joined; templates know a developer by the older name."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(_Strict):
    """The form of an answer; only text is written."""

    type: Literal["text"]


class StreamOptions(_Strict):
    """What else a stream brings."""

    include_usage: bool = False


Count = Annotated[int, Field(ge=1, le=_INTEGER)]
_BOUNDED = {int: Annotated[int, Field(le=_INTEGER)]}
_BUDGET: Any = {name: (_BOUNDED.get(hint, hint) | None, None) for name, hint in field_hints(TransportBudget).items()}
Transport = create_model(
    "Transport",
    __base__=_Strict,
    **_BUDGET,
    num_particles=(Count | None, None),
    draws=(Count | None, None),
    decoder=(DecoderName | None, None),
    select=(Selection | None, None),
    timeout_sec=(Annotated[float, Field(gt=0)] | None, None),
)
BUDGET_FIELDS = tuple(one.name for one in fields(TransportBudget))


class RequestBody(_Strict):
    """What chat and plain completions have in common."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, body: Any) -> Any:
        return without_neutral(body, NEUTRAL)

    model: str
    max_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=_INTEGER)
    seed: int | None = Field(None, ge=-_SEED, lt=_SEED)
    stop: (
        Annotated[str, Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    transport: Transport | None = None  # type: ignore[valid-type]
    user: str | None = Field(None, max_length=256)  # notes of the client's, not looked at
    safety_identifier: str | None = Field(None, max_length=256)
    prompt_cache_key: str | None = Field(None, max_length=256)
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    n: int | None = Field(None, ge=1, le=1)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)


class ChatBody(RequestBody):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024, fail_fast=True)]
    max_completion_tokens: Count | None = None
    logprobs: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None
    store: Literal[False] | None = None


class CompletionBody(RequestBody):
    """The body of ``/v1/completions``; a prompt is text or token ids and gets no chat template."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[
            list[Annotated[int, Field(ge=0, le=_INTEGER)]], Field(min_length=1, max_length=2**17, fail_fast=True)
        ]
    )
    echo: Literal[False] | None = None
    best_of: int | None = Field(None, ge=1, le=1)


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], body: bytes) -> Body:
    """Return a body as its model.

    Raises:
        RequestError: 400, naming the first field that is at fault, the value seen and what it must be.
    """
    try:
        found = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explained(kind, error) from None
    json.loads(body, object_pairs_hook=_once)
    return found


def _once(pairs: list[tuple[str, Any]]) -> None:
    """Refuse a key that stands twice in one object: readers of JSON differ in which of the two they take."""
    seen = set()
    for name, _ in pairs:
        if name in seen:
            raise RequestError(
                400, f"{name} stands twice in one object; give it once", param=name, code="duplicate_field"
            )
        seen.add(name)


def _explained(kind: type[BaseModel], error: ValidationError) -> RequestError:
    found = error.errors(include_url=False, include_context=False)
    first = found[0]
    path = _path(first["loc"])[:_NAME_SHOWN]
    if first["type"] == "json_invalid":
        return RequestError(400, f"the body is not JSON in UTF-8: {first['msg']}", code="invalid_json")
    if not path:
        return RequestError(400, "the body must be a JSON object", code="invalid_json")
    if first["type"] == "extra_forbidden" and path in NEUTRAL:
        said = f"{path} is not supported, got {_shown(first['input'])}; leave it out, or send null"
        return RequestError(400, said, param=path, code="unsupported_field")
    if first["type"] == "extra_forbidden":
        return RequestError(400, f"{path} is unknown{_nearest(kind, path)}", param=path, code="unknown_field")
    if first["type"] == "missing":
        return RequestError(400, f"{path} is missing", param=path, code="missing_field")
    wanted = dict.fromkeys(one["msg"] for one in found if _path(one["loc"]).startswith(path))
    said = ", or ".join(one[0].lower() + one[1:] for one in wanted).replace("input should be", "must be")
    return RequestError(400, f"{path} {said}, got {_shown(first['input'])}", param=path, code="invalid_value")


def _path(loc: tuple[int | str, ...]) -> str:
    parts = [part for part in loc if isinstance(part, int) or not _BRANCH.match(part.replace("constrained-", ""))]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _nearest(kind: type[BaseModel], path: str) -> str:
    parent, _, name = path.rpartition(".")
    known = Transport.model_fields if parent == "transport" else kind.model_fields if not parent else {}
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
