"""A full queue, time that is up, clients who leave, and an engine that died: errors, and nothing is left behind."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serving.conftest import MODEL, chat, serving, wait_until
from vgf_llm.engines.engine import EngineError, RequestRefusedError
from vgf_llm.serving.errors import as_request_error

openai = pytest.importorskip("openai", reason="the openai client is not installed (it comes with vLLM)")
CHAT = "/v1/chat/completions"
LONG = chat(max_tokens=100, transport={"num_particles": 8, "draws": 4, "rounds": 4, "decoder": "pivot"})
MEDIUM = chat(max_tokens=100, transport={"num_particles": 8, "draws": 4})
SHORT = chat(max_tokens=2, transport={"steps": 0, "num_particles": 1})


def connected(running):
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def head(length):
    lines = (f"POST {CHAT} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}", "", "")
    return "\r\n".join(lines).encode()


def is_at_rest(running):
    admission = running.server.worker.admission
    return admission.running == admission.waiting == running.engine.unfinished == 0


def test_more_requests_than_there_is_room_for_are_told_when_to_come_again(served_pipeline):
    with (
        serving(served_pipeline, max_running=1, max_waiting=2) as own,
        ThreadPoolExecutor(8) as pool,
        own.http() as http,
    ):
        found = list(pool.map(lambda _: http.post(CHAT, json=MEDIUM), range(8)))
        taken = [one for one in found if one.status_code == 200]
        turned_away = [one for one in found if one.status_code == 429]
        assert len(taken) >= 3 and len(taken) + len(turned_away) == 8 and len(turned_away) >= 3
        for one in turned_away:
            assert 1 <= int(one.headers["retry-after"]) <= 60
            assert one.json()["error"]["code"] == "queue_full"
        assert len({one.json()["choices"][0]["message"]["content"] for one in taken}) == 1
        assert max(one.json()["transport"]["seconds"]["queue"] for one in taken) > 0
        with pytest.raises(openai.RateLimitError), ThreadPoolExecutor(8) as more:
            client = own.openai()
            list(more.map(lambda _: client.chat.completions.create(**_named(MEDIUM)), range(8)))
        wait_until(lambda: is_at_rest(own))
        assert http.post(CHAT, json=SHORT).status_code == 200


def _named(body):
    extra = {"transport": body["transport"]}
    return {**{key: value for key, value in body.items() if key != "transport"}, "extra_body": extra}


@pytest.mark.parametrize("stream", [False, True])
def test_time_that_is_up_is_an_error_and_frees_the_work(running, stream):
    body = {**LONG, "transport": {**LONG["transport"], "timeout_sec": 0.3}, "stream": stream}
    started = time.monotonic()
    with running.http() as http:
        told = http.post(CHAT, json=body)
        if stream:
            assert '"deadline_exceeded"' in told.text and "[DONE]" not in told.text
        else:
            assert told.status_code == 504 and told.json()["error"]["code"] == "deadline_exceeded"
            assert "no answer within 0.3 s" in told.json()["error"]["message"]
        assert time.monotonic() - started < 5
        wait_until(lambda: is_at_rest(running))
        assert http.post(CHAT, json=SHORT).status_code == 200


def test_time_is_up_while_waiting_for_a_place(served_pipeline):
    with (
        serving(served_pipeline, max_running=1, max_waiting=8) as own,
        ThreadPoolExecutor(1) as pool,
        own.http() as http,
    ):
        first = pool.submit(http.post, CHAT, json=MEDIUM)
        wait_until(lambda: own.server.worker.admission.running)
        body = {**SHORT, "transport": {**SHORT["transport"], "timeout_sec": 0.2}}
        assert http.post(CHAT, json=body).status_code == 504
        assert own.server.worker.admission.waiting == 0
        assert first.result().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_who_leaves_frees_the_work(running, stream):
    body = json.dumps({**LONG, "stream": stream}).encode()
    with connected(running) as connection:
        connection.sendall(head(len(body)) + body)
        wait_until(lambda: running.server.worker.admission.running and running.engine.unfinished)
    left = time.monotonic()
    wait_until(lambda: is_at_rest(running))
    assert time.monotonic() - left < 5
    assert not running.engine._llm.llm_engine.has_unfinished_requests()
    with running.http() as http:
        assert http.post(CHAT, json=SHORT).status_code == 200


def test_a_client_whose_body_never_comes_harms_nobody(running):
    with connected(running) as connection, running.http() as http:
        connection.sendall(head(100) + b"{")
        assert http.post(CHAT, json=SHORT).status_code == 200


class _Mortal:
    """The engine of the tests, until it is said to have died."""

    def __init__(self, engine):
        self.name, self.engine, self.dead = engine.name, engine, threading.Event()

    def check(self):
        if self.dead.is_set():
            raise EngineError(f"the {self.name} died: for a test")

    def run(self, requests, deadline=None):
        self.check()
        return self.engine.run(requests, deadline)

    def close(self):
        pass


def test_another_engine_is_started_and_health_says_what_holds(served_pipeline):
    """The supervisor with an engine that is declared dead; a real kill is tested with the real command."""
    may_start, restarted = threading.Event(), threading.Event()
    first = _Mortal(served_pipeline.reference.engine)

    def start(deadline):
        may_start.wait(20)
        return _Mortal(served_pipeline.reference.engine)

    with serving(served_pipeline, engine=first, start=start, on_restart=restarted.set) as own, own.http() as http:
        assert http.get("/health").status_code == http.post(CHAT, json=SHORT).status_code == 200
        first.dead.set()
        told = http.post(CHAT, json=SHORT)
        assert told.status_code == 503 and "died" in told.json()["error"]["message"]
        assert http.get("/health").status_code == 503
        wait_until(lambda: "vgf_engine_up 0.0" in http.get("/metrics").text)
        told = http.post(CHAT, json=SHORT)
        assert told.status_code == 503 and "another one starts" in told.json()["error"]["message"]
        assert int(told.headers["retry-after"]) >= 1
        may_start.set()
        assert restarted.wait(10)
        assert http.get("/health").status_code == http.post(CHAT, json=SHORT).status_code == 200


def test_a_start_that_fails_again_and_again_ends_the_server(served_pipeline, capfd):
    first, ended, tries = _Mortal(served_pipeline.reference.engine), threading.Event(), []

    def start(deadline):
        tries.append(1)
        raise EngineError("no memory")

    with serving(served_pipeline, engine=first, start=start, on_end=ended.set):
        first.dead.set()
        assert ended.wait(10) and len(tries) == 3
    assert "start 3 of 3 failed: no memory" in capfd.readouterr().err


class _Broken(_Mortal):
    """Fails with something that nobody thought of."""

    def check(self):
        if self.dead.is_set():
            raise KeyError("for a test")


def test_an_error_that_nobody_thought_of_is_a_death(served_pipeline, capfd):
    first, ended = _Broken(served_pipeline.reference.engine), threading.Event()

    def start(deadline):
        raise OverflowError("no port")

    with serving(served_pipeline, engine=first, start=start, on_end=ended.set) as own, own.http() as http:
        first.dead.set()
        assert ended.wait(10)
        assert http.get("/health").status_code == 503 and not own.server.supervisor.is_up
    said = capfd.readouterr().err
    assert "KeyError: 'for a test'" in said and "start 3 of 3 failed: no port" in said and "Traceback" in said


def test_engines_that_start_and_die_again_and_again_end_the_server(served_pipeline):
    first, ended, started = _Mortal(served_pipeline.reference.engine), threading.Event(), []

    def start(deadline):
        started.append(_Mortal(served_pipeline.reference.engine))
        started[-1].dead.set()
        return started[-1]

    with serving(served_pipeline, engine=first, start=start, on_end=ended.set):
        first.dead.set()
        assert ended.wait(20) and len(started) == 3


def test_what_an_engine_died_of_is_in_the_log_and_nowhere_else(served_pipeline, capfd):
    first = _Mortal(served_pipeline.reference.engine)
    with serving(served_pipeline, engine=first, start=lambda _: first) as own, own.http() as http:
        first.dead.set()
        told = http.post(CHAT, json=SHORT)
        assert told.status_code == 503 and "for a test" not in told.text
    assert "died: for a test" in capfd.readouterr().err


def test_prompts_are_encoded_by_who_has_a_place_and_health_answers_meanwhile(served_pipeline):
    """A tokenizer that does not come to an end holds one place; the queue is bounded, and time runs from arrival."""
    slow = threading.Event()
    with (
        serving(served_pipeline, max_running=1, max_waiting=1) as own,
        ThreadPoolExecutor(8) as pool,
        own.http() as http,
    ):
        encoded = own.server.service.questions.encoded
        own.server.service.questions.encoded = lambda question: (slow.wait(20), encoded(question))[1]
        hurried = {**SHORT, "transport": {**SHORT["transport"], "timeout_sec": 1.0}}
        found = [pool.submit(http.post, CHAT, json=hurried) for _ in range(6)]
        wait_until(lambda: sum(one.done() for one in found) == 4)
        assert [one.result().status_code for one in found if one.done()] == [429] * 4
        assert http.get("/health").status_code == 200
        asked = time.monotonic()
        wait_until(lambda: all(one.done() for one in found))
        assert time.monotonic() - asked < 4
        assert sorted(one.result().status_code for one in found) == [429] * 4 + [504] * 2
        assert own.server.worker.admission.running == 1  # what cannot be broken off keeps its place
        slow.set()
        wait_until(lambda: is_at_rest(own))
        assert http.post(CHAT, json=SHORT).status_code == 200


def test_a_stream_is_counted_as_what_it_ends_in(served_pipeline):
    late = {**LONG, "transport": {**LONG["transport"], "timeout_sec": 0.5}, "stream": True}
    with serving(served_pipeline) as own, own.http() as http:
        assert http.post(CHAT, json={**SHORT, "stream": True}).status_code == 200
        http.post(CHAT, json=late)
        text = http.get("/metrics").text
        for status in (200, 504):
            assert f'vgf_requests_total{{endpoint="{CHAT}",status="{status}"}} 1.0' in text


def test_requests_in_one_connection_and_http_errors_of_the_client_do_not_add_up(running):
    with httpx.Client(base_url=running.url, limits=httpx.Limits(max_connections=1)) as http:
        for _ in range(20):
            assert http.post(CHAT, json=SHORT).status_code == 200
            assert http.post(CHAT, json={"model": MODEL}).status_code == 400
    assert is_at_rest(running)


def test_what_an_engine_refuses_is_the_clients_to_mend_and_names_no_path():
    told = as_request_error(RequestRefusedError("the vLLM engine of /models/base refuses request 0: it is too long"))
    assert (told.status, str(told)) == (400, "the engine refuses request 0: it is too long")
