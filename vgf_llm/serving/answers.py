"""Answers in OpenAI's shapes, whole or in pieces; ``transport`` stands beside the choices."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vgf_llm.serving.service import Answer


@dataclass(frozen=True)
class Form:
    """How one answer is written down.

    Attributes:
        is_chat: Chat completions, or plain ones.
        model: Name of the model.
        id: Of the answer.
        created: Seconds since 1970.
    """

    is_chat: bool
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the body of a whole answer."""
        said = {"message": {"role": "assistant", "content": answer.text}} if self.is_chat else {"text": answer.text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": answer.finish_reason}
        return {**self._head(""), "choices": [choice], "usage": _usage(answer), "transport": answer.transport}

    def first_piece(self) -> str | None:
        """Return what a stream begins with, before there is an answer."""
        return self._piece({"delta": {"role": "assistant", "content": ""}}) if self.is_chat else None

    def pieces(self, answer: Answer, include_usage: bool) -> Iterator[str]:
        """Yield an answer as server-sent events, a word each; ``transport`` comes with the last one."""
        words = re.findall(r"\s*\S+\s*$|\s*\S+|\s+$", answer.text) or [""]
        for number, word in enumerate(words, 1):
            transport = answer.transport if number == len(words) else None
            yield self._piece({"delta": {"content": word}} if self.is_chat else {"text": word}, transport=transport)
        yield self._piece({"delta": {}} if self.is_chat else {"text": ""}, answer.finish_reason)
        if include_usage:
            yield event({**self._head(".chunk"), "choices": [], "usage": _usage(answer)})
        yield "data: [DONE]\n\n"

    def _piece(
        self, said: dict[str, Any], finish_reason: str | None = None, transport: dict[str, Any] | None = None
    ) -> str:
        more = {} if transport is None else {"transport": transport}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head(".chunk"), "choices": [choice], **more})

    def _head(self, part: str) -> dict[str, Any]:
        kind, prefix = (f"chat.completion{part}", "chatcmpl") if self.is_chat else ("text_completion", "cmpl")
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


def event(body: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.completion_tokens
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": total,
    }
