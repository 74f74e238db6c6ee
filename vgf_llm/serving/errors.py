"""What a client is told when they get no answer: a status, OpenAI's error body, and when to come again."""

from __future__ import annotations

from typing import Any

from vgf_llm.engines.deadline import AbandonedError, DeadlineError
from vgf_llm.engines.engine import EngineError, RequestRefusedError
from vgf_llm.errors import ConfigError, DataError, VGFError

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}

_BODY_UNREAD = (401, 408, 413, 415)  # what still comes of the body is not waited for


class RequestError(VGFError):
    """A request that is not answered.

    Args:
        status: HTTP status, 400 to 599.
        message: What is wrong, the value seen, and what to do.
        param: The field that is at fault, with dots: ``transport.nats``.
        code: A word for programs.
        retry_sec: When to come again, in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_sec: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_sec = status, param, code, retry_sec

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        found = {} if self.retry_sec is None else {"Retry-After": str(self.retry_sec)}
        return found | ({"Connection": "close"} if self.status in _BODY_UNREAD else {})


def refused(param: str, message: str) -> RequestError:
    """Return the 400 for a field."""
    return RequestError(400, message, param=param, code="invalid_value")


def as_request_error(error: BaseException) -> RequestError:
    """Return what the client is told of any error that ended their request; what is ours to mend is not spelt out."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, DeadlineError):
        return RequestError(504, f"{error} (transport.timeout_sec, or the server's)", code="deadline_exceeded")
    if isinstance(error, AbandonedError):
        return RequestError(499, str(error), code="client_left")
    if isinstance(error, RequestRefusedError):
        return RequestError(400, f"the engine refuses {str(error).partition(' refuses ')[2]}", code="invalid_value")
    if isinstance(error, EngineError):
        # Paths and process ids in it are nobody's business; the log has them.
        return RequestError(503, "the engine died or could not answer; come again", code="engine_error", retry_sec=5)
    if isinstance(error, ConfigError | DataError):
        return RequestError(400, str(error), code="invalid_value")
    if isinstance(error, VGFError):
        return RequestError(500, str(error), code="answer_failed")
    return RequestError(500, "the server failed; its log says why", code="internal_error")
