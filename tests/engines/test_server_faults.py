"""What a server that is none, or is somebody else's, cannot do to whoever asks it; no vLLM is needed for it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vgf_llm.engines.deadline import Deadline, DeadlineError
from vgf_llm.engines.engine import EngineError, EngineRequest, RequestRefusedError
from vgf_llm.engines.vllm_server import VLLMServer, _body
from vgf_llm.settings import EngineSettings, SamplingSettings


@contextlib.contextmanager
def answering(post, get=lambda handler: handler.answer(200, {"data": [{"id": "tiny"}]})):
    """Yield the URL of a server that lists a model, and answers a POST with ``post(handler)``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            get(self)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            post(self)

        def answer(self, code, body, **headers):
            text = json.dumps(body).encode()
            self.send_response(code)
            for name, value in {"Content-Length": len(text), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


ASK = EngineRequest([1, 2], 3)


@pytest.mark.parametrize(
    "post",
    [
        lambda handler: handler.wfile.write(b"no HTTP at all\r\n\r\n"),
        lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
    ],
    ids=["no status", "cut off"],
)
def test_an_answer_that_is_no_http_is_an_error_of_the_server(post):
    with answering(post) as url, pytest.raises(EngineError, match=f"vLLM server at {url} cannot be reached"):
        VLLMServer(EngineSettings(url=url)).run([ASK])


@pytest.mark.parametrize(("code", "kind"), [(400, RequestRefusedError), (500, EngineError), (503, EngineError)])
def test_only_what_is_wrong_with_a_request_is_a_refusal(code, kind):
    with (
        answering(lambda handler: handler.answer(code, {"error": "because"})) as url,
        pytest.raises(EngineError, match=f"refuses a request with {code}.*because") as raised,
    ):
        VLLMServer(EngineSettings(url=url)).run([ASK] * 3)
    assert type(raised.value) is kind


def test_the_key_is_not_taken_to_where_a_redirect_leads(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    seen = []
    with (
        answering(None, get=lambda handler: seen.append(handler.headers)) as elsewhere,
        answering(lambda handler: handler.answer(302, {}, Location=elsewhere)) as url,
        pytest.raises(EngineError, match="with 302"),
    ):
        VLLMServer(EngineSettings(url=url)).run([ASK])
    assert not seen


def test_texts_come_in_the_order_of_their_requests():
    def post(handler):
        time.sleep(0.01 * (next(turns) % 3))
        handler.answer(200, {"choices": [{"token_ids": [7]}]})

    turns = iter(range(20))
    with answering(post) as url:
        found = VLLMServer(EngineSettings(url=url, max_sequences=4)).run([ASK] * 20)
        assert [text.tokens for text in found] == [[7]] * 20


def test_a_caller_who_leaves_does_not_wait_and_nor_does_the_exit():
    """The server never answers: the deadline ends the wait, and the process ends with requests on their way."""
    with answering(lambda handler: time.sleep(60)) as url:
        server = VLLMServer(EngineSettings(url=url, timeout_sec=50))
        with pytest.raises(DeadlineError):
            server.run([ASK] * 3, Deadline(0.2))
        script = (
            "from tests.engines.test_server_faults import *\n"
            f"server = VLLMServer(EngineSettings(url={url!r}, timeout_sec=50))\n"
            "print('asking', flush=True)\n"
            "server.run([ASK] * 3, Deadline(0.2))"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout.readline() == b"asking\n"
            started = time.monotonic()
            try:
                _, said = process.communicate(timeout=20)
            finally:
                process.kill()
    assert b"DeadlineError: no answer within 0.2 s" in said
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(("seed", "sent"), [(5, 5), (-1, 2**63 - 1), (2**64 + 3, 3)])
def test_a_seed_is_sent_in_the_bits_that_vllm_takes(seed, sent):
    asked = EngineRequest([1], 2, sampling=SamplingSettings(), seed=seed)
    assert _body(asked, "tiny")["seed"] == sent
    assert "seed" not in _body(EngineRequest([1], 2, sampling=SamplingSettings()), "tiny")
