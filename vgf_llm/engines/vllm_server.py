"""vLLM behind a URL: its own OpenAI-compatible server, asked for token ids in and out.

Every text is a request to ``/v1/completions`` of its own, as many at a time as the server writes side by side; its
continuous batching does the rest. The server must run the plan processor and report enough log-probabilities:

    VLLM_USE_V2_MODEL_RUNNER=0 python -m vllm.entrypoints.openai.api_server --model MODEL --max-logprobs 64
        --logits-processors vgf_llm.engines.vllm_processor:PlanProcessor
        --additional-config '{"vgf_table": "FOLDER"}'

with FOLDER from :func:`vgf_llm.engines.vllm_table.save_table`. An API key is read from ``VLLM_API_KEY``.

Weights are pushed as the name of a folder that the server can read: an adapter where it runs with --enable-lora and
VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, a whole model where it runs with VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls
vgf_llm.engines.vllm_worker.FolderWorker.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vgf_llm.engines.deadline import OPEN, Deadline
from vgf_llm.engines.engine import (
    EngineError,
    EngineRequest,
    EngineText,
    RequestRefusedError,
    TopLogps,
    engine_seed,
)
from vgf_llm.engines.vllm_engine import PLAN_ARGUMENT, WORKER
from vgf_llm.engines.vllm_env import ADAPTERS_AT_RUNTIME, WEIGHTS_AT_RUNTIME, api_key, stated
from vgf_llm.settings import EngineSettings

_LONGEST_MESSAGE = 400
_REFUSALS = (400, 413, 422)
_LOOK_SEC = 0.1
_TOKEN_PREFIX = "token_id:"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows none: the API key would go along to wherever it leads."""

    def redirect_request(self, *args: Any) -> None:
        return None


class VLLMServer:
    """An engine behind ``settings.url``.

    Args:
        settings: The URL, the model's name there, how many texts to ask for at a time, and patience: an answer that
            takes longer than ``timeout_sec`` is given up.

    Raises:
        EngineError: If the server does not answer, or has no model of that name.
    """

    def __init__(self, settings: EngineSettings) -> None:
        if settings.url is None:
            raise ValueError("a server needs engine.url")
        self.settings, self._url = settings, settings.url.rstrip("/")
        self.name, self._pushed = f"vLLM server at {settings.url}", ""
        self._opener = urllib.request.build_opener(_NoRedirect)
        served = [entry["id"] for entry in self._ask("/v1/models", None)["data"]]
        self.model = settings.served_model or served[0]
        if self.model not in served:
            raise EngineError(f"the {self.name} has no model {self.model!r}; it serves {', '.join(served)}")

    def run(self, requests: Sequence[EngineRequest], deadline: Deadline | None = None) -> list[EngineText]:
        """Return what came of each request; see :class:`vgf_llm.engines.engine.Engine`.

        Of a caller who leaves, what was sent already is written to its end by the server.
        """
        deadline, left = deadline or OPEN, list(enumerate(requests))[::-1]
        done: queue.SimpleQueue[tuple[int, EngineText | BaseException]] = queue.SimpleQueue()

        def work() -> None:
            with contextlib.suppress(IndexError):  # nothing is left
                while True:
                    index, request = left.pop()
                    try:
                        done.put((index, self._run(request)))
                    except BaseException as error:  # raised by the one who waits
                        done.put((index, error))

        # Daemons, unlike a pool's: of a caller who left, those that still wait for an answer do not hold up the exit.
        for _ in range(min(len(requests), self.settings.max_sequences)):
            threading.Thread(target=work, name=self.name, daemon=True).start()
        try:
            return _gathered(done, len(requests), deadline)
        finally:
            left.clear()

    def check(self) -> None:
        """Do nothing while it answers; see :class:`vgf_llm.engines.engine.Engine`."""
        self._ask("/v1/models", None)

    def push_adapter(self, folder: str | Path) -> str:
        """Load a LoRA in place of the one before; see :class:`vgf_llm.engines.engine.TakesWeights`."""
        name, old = str(folder), self._pushed
        how = f"--enable-lora, --max-lora-rank of at least its rank and {stated(ADAPTERS_AT_RUNTIME)}"
        self._push("/v1/load_lora_adapter", {"lora_name": name, "lora_path": name}, folder, how)
        self._pushed = name
        if old:
            self._send("/v1/unload_lora_adapter", {"lora_name": old})
        return name

    def push_weights(self, folder: str | Path) -> None:
        """Replace all weights by a folder's; see :class:`vgf_llm.engines.engine.TakesWeights`."""
        body = {"method": "load_folder", "args": [str(folder)]}
        how = f"{stated(WEIGHTS_AT_RUNTIME)} and --worker-extension-cls {WORKER}"
        self._push("/collective_rpc", body, folder, how)
        if not self._ask("/reset_prefix_cache", {})["success"]:
            raise EngineError(
                f"the {self.name} keeps its prefix cache, which is of the weights before: somebody else is asking it; "
                "let nobody else use a server whose weights are trained"
            )

    def close(self) -> None:
        """Let go of the LoRA that was pushed; else nothing is held: every request had a connection of its own."""
        if self._pushed:
            old, self._pushed = self._pushed, ""
            with contextlib.suppress(EngineError):  # it may be gone
                self._send("/v1/unload_lora_adapter", {"lora_name": old})

    def _run(self, request: EngineRequest) -> EngineText:
        choice = self._ask("/v1/completions", _body(request, request.adapter or self.model))["choices"][0]
        prompt = along = None
        if request.prompt_logprobs is not None:
            prompt = _prompt_logps(choice["prompt_logprobs"][1:], request)
        if request.logprobs:
            along = _written_logps(choice, request.logprobs)
        return EngineText(choice["token_ids"], along, prompt)

    def _push(self, path: str, body: dict[str, Any], folder: str | Path, how: str) -> None:
        try:
            self._send(path, body)
        except EngineError as error:
            raise EngineError(f"{error}; it must run with {how}, and be able to read '{folder}'") from error

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        answer = self._send(path, body)
        try:
            found: dict[str, Any] = json.loads(answer)
            return found
        except ValueError as error:
            raise EngineError(f"the {self.name} answers {path} with no JSON: {error}; is it vLLM's server?") from error

    def _send(self, path: str, body: dict[str, Any] | None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if (key := api_key()) is not None:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"{self._url}{path}", data, headers)
        try:
            with self._opener.open(asked, timeout=self.settings.timeout_sec) as answer:
                found: bytes = answer.read()
                return found
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:_LONGEST_MESSAGE]
            kind = RequestRefusedError if error.code in _REFUSALS else EngineError
            raise kind(f"the {self.name} refuses a request with {error.code}: {said}") from error
        except TimeoutError as error:
            raise EngineError(
                f"the {self.name} hangs: no answer to {path} in {self.settings.timeout_sec:g} s (timeout_sec)"
            ) from error
        except (OSError, http.client.HTTPException) as error:  # urllib's own are OSErrors
            reason = getattr(error, "reason", None) or repr(error)
            if isinstance(reason, TimeoutError):
                reason = f"no connection in {self.settings.timeout_sec:g} s"
            raise EngineError(f"the {self.name} cannot be reached: {reason}; is it running?") from error


def _gathered(
    done: queue.SimpleQueue[tuple[int, EngineText | BaseException]], number: int, deadline: Deadline
) -> list[EngineText]:
    """Wait for texts and return them in order; raises the first error among them."""
    found: dict[int, EngineText] = {}
    while len(found) < number:
        deadline.check()
        with contextlib.suppress(queue.Empty):
            index, text = done.get(timeout=_LOOK_SEC)
            if isinstance(text, BaseException):
                raise text
            found[index] = text
    return [found[index] for index in range(number)]


def _body(request: EngineRequest, model: str) -> dict[str, Any]:
    own = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0.0,
        "stop_token_ids": list(request.eos_ids),
        "stop": list(request.stop),
        "ignore_eos": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "prompt_logprobs": request.prompt_logprobs,
        "logit_bias": request.logit_bias and {str(one): bias for one, bias in request.logit_bias.items()},
    }
    if request.plan is not None:
        body["vllm_xargs"] = {PLAN_ARGUMENT: request.plan.encoded()}
    elif own is not None:
        body |= {"temperature": own.temperature, "top_k": own.top_k, "top_p": own.top_p}
        body["seed"] = engine_seed(request.seed)
    if request.logprobs:
        body["logprobs"] = request.logprobs
    return {key: value for key, value in body.items() if value is not None}


def _written_logps(choice: dict[str, Any], columns: int) -> TopLogps:
    """Read the log-probabilities of a choice: a place lists the most probable tokens and the one that was written."""
    places = [
        {int(key[len(_TOKEN_PREFIX) :]): logp for key, logp in top.items()}
        for top in choice["logprobs"]["top_logprobs"]
    ]
    return _sorted(places, choice["token_ids"], columns)


def _prompt_logps(places: list[dict[str, Any]], request: EngineRequest) -> TopLogps:
    logps = [{int(key): entry["logprob"] for key, entry in place.items()} for place in places]
    return _sorted(logps, request.prompt[1:], request.prompt_logprobs or 0)


def _sorted(places: list[dict[int, float]], tokens: Sequence[int], columns: int) -> TopLogps:
    own = [place[token] for place, token in zip(places, tokens, strict=True)]
    best = [sorted(place.items(), key=lambda pair: -pair[1])[:columns] for place in places]
    ids = [[token for token, _ in top] for top in best]
    logps = [[logp for _, logp in top] for top in best]
    shape = (len(places), columns)
    return TopLogps(
        torch.tensor(own), torch.tensor(ids, dtype=torch.int64).view(shape), torch.tensor(logps).view(shape)
    )
