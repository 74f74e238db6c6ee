"""The edge of the server: the key, the body, every error as OpenAI's body, and one count and one log line per request.

Routes are wrapped by :meth:`Edge.answering` and know nothing of these.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from vgf_llm.console.screen import people, say
from vgf_llm.engines.deadline import AbandonedError
from vgf_llm.engines.engine import EngineError
from vgf_llm.errors import VGFError
from vgf_llm.serving.errors import RequestError, as_request_error
from vgf_llm.serving.metrics import Metrics
from vgf_llm.serving.settings import LimitSettings

_KEYLESS = ("/health", "/metrics")  # neither do these have a log line

Handler = Callable[[Request], Awaitable[Response]]


class Edge:
    """Stands between HTTP and the routes.

    Args:
        limits: The largest body, and how long one may take to come.
        metrics: Counts requests.
        api_key: What a request must send as a bearer token; nothing is asked for when None.
    """

    def __init__(self, limits: LimitSettings, metrics: Metrics, api_key: str | None) -> None:
        self.limits, self.metrics = limits, metrics
        self._key = None if api_key is None else api_key.encode()

    def answering(self, path: str, handler: Handler) -> Handler:
        """Wrap a route: the key first, every error as OpenAI's body, then the count and the log line."""

        async def answering(request: Request) -> Response:
            request.state.id, request.state.began = uuid.uuid4().hex, time.monotonic()
            try:
                if path not in _KEYLESS:
                    self._check_key(request)
                response = await handler(request)
            except asyncio.CancelledError:  # the time that a server has to end is up
                response = error_response(stopping())
            except Exception as error:
                response = error_response(error)
            response.headers["X-Request-Id"] = request.state.id
            if not isinstance(response, StreamingResponse):  # a stream counts when it ends, as what it ended in
                self.ended(request, path, response.status_code)
            return response

        return answering

    def ended(self, request: Request, path: str, status: int) -> None:
        """Count a request, and log it without anything that it said."""
        self.metrics.requests.labels(path, status).inc()
        if path not in _KEYLESS:
            at, seconds = time.strftime("%Y-%m-%d %H:%M:%S"), time.monotonic() - request.state.began
            line = f"{at} {request.method} {path} {status} {seconds:.2f} s {request.state.id}"
            say(f"vgf-llm serve: {line}")

    async def body(self, request: Request) -> bytes:
        """Return the body, of which no more is read than it may have.

        Raises:
            RequestError: 415 where it is not JSON by its type, 413 where it is too large, 408 where it does not come.
            AbandonedError: If the caller has left.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "Content-Type must be application/json", param="Content-Type")
        most, stated = self.limits.body_kib * 1024, request.headers.get("content-length", "0")
        found = bytearray()
        if int(stated) <= most:
            try:
                async with asyncio.timeout(self.limits.timeout_sec):
                    async for chunk in request.stream():
                        found += chunk
                        if len(found) > most:
                            break
            except TimeoutError as error:
                raise RequestError(408, f"the body did not come within {self.limits.timeout_sec:g} s") from error
            except ClientDisconnect as error:
                raise AbandonedError("the caller has left") from error
        if int(stated) > most or len(found) > most:
            raise RequestError(413, f"the body may have {most} bytes; send less", param="body", code="too_large")
        return bytes(found)

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip(" ").encode("latin-1"), self._key):
            raise RequestError(
                401,
                "Authorization must be 'Bearer <key>' with this server's key",
                param="Authorization",
                code="invalid_api_key",
            )


def stopping() -> RequestError:
    """Return what a request is told that the server's end cuts off."""
    return RequestError(503, "the server is stopping", code="stopping")


def told(error: BaseException) -> RequestError:
    """Return what the client is told; what they cannot mend goes to the log."""
    found = as_request_error(error)
    if isinstance(error, EngineError):
        say(f"vgf-llm serve: {error}")
    elif found.status == 500 and not isinstance(error, VGFError):
        traceback.print_exception(error, file=people())
    return found


def error_response(error: BaseException) -> Response:
    """Return an error as OpenAI's body with its status."""
    found = told(error)
    return JSONResponse(found.body, found.status, found.headers)
