"""The routes: OpenAI's chat completions, completions and models, health, and Prometheus metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from vgf_llm.engines.deadline import AbandonedError
from vgf_llm.serving.answers import Form, event
from vgf_llm.serving.edge import Edge, error_response, stopping, told
from vgf_llm.serving.errors import RequestError
from vgf_llm.serving.metrics import Metrics
from vgf_llm.serving.schema import ChatBody, CompletionBody, RequestBody, parse
from vgf_llm.serving.service import Service
from vgf_llm.serving.supervisor import EngineSupervisor
from vgf_llm.serving.worker import Job, RequestDeadline, Worker, until_done

_SIGN_OF_LIFE_SEC = 5.0  # between comments in a stream whose answer is not there yet
_METRICS_TYPE = "text/plain; version=0.0.4"
_READERS = 2
_LEFT = 499  # what a stream ends in whose client is gone
_SHOWN = 80  # characters of a name that an error repeats


class Server:
    """One service behind HTTP.

    Args:
        service: Answers questions.
        supervisor: Knows whether there is an engine; closed when the server stops.
        metrics: What is counted.
        model: What requests call the model.
        api_key: What they must send as a bearer token; nothing is asked for when None.
    """

    def __init__(
        self, service: Service, supervisor: EngineSupervisor, metrics: Metrics, model: str, api_key: str | None = None
    ) -> None:
        self.service, self.supervisor, self.metrics, self.model = service, supervisor, metrics, model
        self.limits = service.settings.limits
        self.edge = Edge(self.limits, metrics, api_key)
        self.worker: Worker
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reading")  # of bodies
        metrics.engine_up.set_function(lambda: float(supervisor.is_up))

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
            routes=[Route(path, self.edge.answering(path, handler), methods=[verb]) for path, handler, verb in routes],
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
        await asyncio.to_thread(self.supervisor.close)

    # Routes --------------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        return await self._asked(request, ChatBody)

    async def _completions(self, request: Request) -> Response:
        return await self._asked(request, CompletionBody)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._card())

    async def _health(self, request: Request) -> Response:
        await asyncio.to_thread(self.supervisor.engine().check)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=_METRICS_TYPE)

    async def _no_such_route(self, request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return error_response(error)
        message = f"{request.method} {request.url.path[:_SHOWN]}: {error.detail}"
        return error_response(RequestError(error.status_code, message, param="path"))

    # One question --------------------------------------------------------------------------------------------------

    async def _asked(self, request: Request, kind: type[RequestBody]) -> Response:
        deadline = RequestDeadline(self.limits.timeout_sec)
        body = await self.edge.body(request)
        asked = await asyncio.get_running_loop().run_in_executor(self._readers, parse, kind, body)
        self._check_model(asked.model)
        if asked.stream_options is not None and not asked.stream:
            raise RequestError(400, "stream_options needs stream true", param="stream_options", code="invalid_value")
        self.supervisor.engine()  # says at once that there is none
        question = self.service.questions.of(asked)
        deadline.limit(question.timeout_sec)
        job = self.worker.start(question, deadline)
        form = Form(kind is ChatBody, self.model)
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
            ended_in = stopping().status
            yield event(stopping().body)
        except Exception as error:
            found = told(error)
            ended_in = found.status
            yield event(found.body)
        finally:
            job.deadline.abandon()
            self.edge.ended(request, request.url.path, ended_in)

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
