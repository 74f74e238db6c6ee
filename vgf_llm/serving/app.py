"""The routes: OpenAI's chat completions, completions and models, health, and Prometheus metrics."""

from __future__ import annotations

import asyncio
import hmac
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from vgf_llm.console.screen import people, say
from vgf_llm.engines.deadline import AbandonedError
from vgf_llm.engines.engine import EngineError
from vgf_llm.errors import VGFError
from vgf_llm.serving.answers import Form, event
from vgf_llm.serving.errors import RequestError, as_request_error
from vgf_llm.serving.keeper import EngineKeeper
from vgf_llm.serving.metrics import Metrics
from vgf_llm.serving.schema import Asked, AskedChat, AskedText, parse
from vgf_llm.serving.service import Service
from vgf_llm.serving.worker import Job, Patience, Worker, until_done

_SIGN_OF_LIFE_SEC = 5.0  # between comments in a stream whose answer is not there yet
_METRICS_TYPE = "text/plain; version=0.0.4"
_READERS = 2
_LEFT = 499  # what a stream ends in whose client is gone
_SHOWN = 80  # characters of a name that an error repeats
_KEYLESS = ("/health", "/metrics")

Handler = Callable[[Request], Awaitable[Response]]


class Server:
    """One service behind HTTP.

    Args:
        service: Answers questions.
        keeper: Knows whether there is an engine; closed when the server stops.
        metrics: What is counted.
        model: What requests call the model.
        api_key: What they must send as a bearer token; nothing is asked for when None.
    """

    def __init__(
        self, service: Service, keeper: EngineKeeper, metrics: Metrics, model: str, api_key: str | None = None
    ) -> None:
        self.service, self.keeper, self.metrics, self.model = service, keeper, metrics, model
        self.limits = service.settings.limits
        self._key = None if api_key is None else api_key.encode()
        self.worker: Worker
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reading")  # of bodies
        metrics.engine_up.set_function(lambda: float(keeper.is_up))

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            ("/v1/chat/completions", self._chat, "POST"),
            ("/v1/completions", self._completions, "POST"),
            ("/v1/models", self._models, "GET"),
            ("/v1/models/{model:path}", self._one_model, "GET"),
            ("/health", self._health, "GET"),
            ("/metrics", self._metrics, "GET"),
        ]
        app = Starlette(
            routes=[Route(path, self._answering(path, handler), methods=[verb]) for path, handler, verb in routes],
            exception_handlers={HTTPException: self._no_such_route},
            lifespan=self._lifespan,
        )
        app.router.redirect_slashes = False  # a path with a slash too many is unknown, and says so
        return app

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        settings = self.service.settings
        self.worker = Worker(self.service, settings.max_running, settings.max_waiting, self.metrics)
        yield
        self.worker.close()
        self._readers.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.keeper.close)

    def _answering(self, path: str, handler: Handler) -> Handler:
        """Wrap a route: the key first, every error as OpenAI's body, and one count and one line a request."""

        async def answering(request: Request) -> Response:
            request.state.id, request.state.began = uuid.uuid4().hex, time.monotonic()
            try:
                if path not in _KEYLESS:
                    self._check_key(request)
                response = await handler(request)
            except asyncio.CancelledError:  # the time that a server has to end is up
                response = _error_response(_stopping())
            except Exception as error:
                response = _error_response(error)
            response.headers["X-Request-Id"] = request.state.id
            if not isinstance(response, StreamingResponse):  # a stream counts when it ends, as what it ended in
                self._ended(request, path, response.status_code)
            return response

        return answering

    def _ended(self, request: Request, path: str, status: int) -> None:
        """Count a request, and log it without anything that it said."""
        self.metrics.requests.labels(path, status).inc()
        if path not in _KEYLESS:
            at, seconds = time.strftime("%Y-%m-%d %H:%M:%S"), time.monotonic() - request.state.began
            line = f"{at} {request.method} {path} {status} {seconds:.2f} s {request.state.id}"
            say(f"vgf-llm serve: {line}")

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

    # Routes --------------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        return await self._asked(request, AskedChat)

    async def _completions(self, request: Request) -> Response:
        return await self._asked(request, AskedText)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._card())

    async def _health(self, request: Request) -> Response:
        await asyncio.to_thread(self.keeper.engine().check)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=_METRICS_TYPE)

    async def _no_such_route(self, request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:_SHOWN]}: {error.detail}"
        return _error_response(RequestError(error.status_code, message, param="path"))

    # One question --------------------------------------------------------------------------------------------------

    async def _asked(self, request: Request, kind: type[Asked]) -> Response:
        deadline = Patience(self.limits.timeout_sec)
        body = await self._body(request)
        asked = await asyncio.get_running_loop().run_in_executor(self._readers, parse, kind, body)
        self._check_model(asked.model)
        if asked.stream_options is not None and not asked.stream:
            raise RequestError(400, "stream_options needs stream true", param="stream_options", code="invalid_value")
        self.keeper.engine()  # says at once that there is none
        question = self.service.questions.of(asked)
        deadline.limit(question.timeout_sec)
        job = self.worker.start(question, deadline)
        form = Form(kind is AskedChat, self.model)
        if not asked.stream:
            await until_done(job.task, deadline, request.is_disconnected)
            return JSONResponse(form.whole(job.task.result()))
        await until_done(job.begun, deadline, request.is_disconnected)
        if job.task.done():
            job.task.result()  # refused with a status, as long as there is none
        include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        events = self._events(request, form, job, include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _events(self, request: Request, form: Form, job: Job, include_usage: bool) -> AsyncIterator[str]:
        """Yield a stream: its beginning at once, signs of life, then the answer in pieces or an error."""
        ended_in = _LEFT
        try:
            if (first := form.first_piece()) is not None:
                yield first
            while not await until_done(job.task, job.deadline, request.is_disconnected, _SIGN_OF_LIFE_SEC):
                yield ": working\n\n"
            for piece in form.pieces(job.task.result(), include_usage):
                yield piece
            ended_in = 200
        except AbandonedError:
            return
        except asyncio.CancelledError:
            ended_in = _stopping().status
            yield event(_stopping().body)
        except Exception as error:
            found = _told(error)
            ended_in = found.status
            yield event(found.body)
        finally:
            job.deadline.abandon()
            self._ended(request, request.url.path, ended_in)

    async def _body(self, request: Request) -> bytes:
        """Return the body, of which no more is read than it may have."""
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

    def _check_model(self, name: str) -> None:
        if name != self.model:
            raise RequestError(
                404,
                f"model {name[:_SHOWN]!r} is not served; there is {self.model!r}",
                param="model",
                code="model_not_found",
            )

    def _card(self) -> dict[str, object]:
        return {"id": self.model, "object": "model", "created": 0, "owned_by": "vgf_llm"}


def _stopping() -> RequestError:
    return RequestError(503, "the server is stopping", code="stopping")


def _told(error: BaseException) -> RequestError:
    """Return what the client is told; what they cannot mend goes to the log."""
    found = as_request_error(error)
    if isinstance(error, EngineError):
        say(f"vgf-llm serve: {error}")
    elif found.status == 500 and not isinstance(error, VGFError):
        traceback.print_exception(error, file=people())
    return found


def _error_response(error: BaseException) -> Response:
    found = _told(error)
    return JSONResponse(found.body, found.status, found.headers)
