"""Bad requests: each gets a 4xx whose message names the field, and the server answers the next request."""

from __future__ import annotations

import contextlib
import json

import pytest

from tests.serving.conftest import MODEL, chat, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}


def moved(**transport):
    return chat(transport=transport)


def without(name):
    return {key: value for key, value in chat().items() if key != name}


# name -> (body: an object, or bytes as they are; field that must be named)
BAD_CHATS = {
    "no model": (without("model"), "model"),
    "model of another type": (chat() | {"model": 3}, "model"),
    "no messages": (without("messages"), "messages"),
    "messages empty": (chat() | {"messages": []}, "messages"),
    "messages as text": (chat() | {"messages": "hello"}, "messages"),
    "a message without content": (chat() | {"messages": [{"role": "user"}]}, "messages[0].content"),
    "a message of an unknown role": (chat() | {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    "content of another type": (chat() | {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    "an image": (
        chat() | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content",
    ),
    "a message with a field too many": (
        chat() | {"messages": [{"role": "user", "content": "x", "nickname": "y"}]},
        "messages[0].nickname",
    ),
    "prompt too long": (chat("sea " * 500), "messages"),
    "max_tokens 0": (chat(max_tokens=0), "max_tokens"),
    "max_tokens negative": (chat(max_tokens=-5), "max_tokens"),
    "max_tokens over the limit": (chat(max_tokens=101), "max_tokens"),
    "max_tokens as text": (chat(max_tokens="8"), "max_tokens"),
    "max_tokens as a fraction": (chat(max_tokens=8.5), "max_tokens"),
    "max_tokens twice": (chat(max_tokens=8, max_completion_tokens=8), "max_tokens"),
    "prompt and answer too long together": (chat("sea " * 60, max_tokens=100), "messages"),
    "temperature negative": (chat(temperature=-1), "temperature"),
    "temperature as true": (chat(temperature=True), "temperature"),
    "temperature next to nothing": (chat(temperature=1e-9), "temperature"),
    "temperature 0 with transport": (chat(temperature=0), "temperature"),
    "top_p 0": (chat(top_p=0), "top_p"),
    "top_p above 1": (chat(top_p=1.5), "top_p"),
    "top_k negative": (chat(top_k=-1), "top_k"),
    "top_k over what the engine reports": (chat(top_k=13), "top_k"),
    "top_k off with transport": (chat(top_k=0), "top_k"),
    "seed too large": (chat(seed=2**63), "seed"),
    "seed as a fraction": (chat(seed=1.5), "seed"),
    "stop empty": (chat(stop=[""]), "stop"),
    "stop of numbers": (chat(stop=[1]), "stop"),
    "five stop strings": (chat(stop=list("abcde")), "stop"),
    "stop with a decoder that writes in pieces": (chat(stop="sea", transport={"decoder": "block"}), "stop"),
    "two answers": (chat(n=2), "n"),
    "a bias": (chat(logit_bias={"5": 1}), "logit_bias"),
    "a tool that must be called": (chat(tool_choice="required"), "tool_choice"),
    "a repetition penalty": (chat(repetition_penalty=1.1), "repetition_penalty"),
    "a call to a tool": (
        chat() | {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls",
    ),
    "stream as text": (chat(stream="yes"), "stream"),
    "stream_options without stream": (chat(stream_options={"include_usage": True}), "stream_options"),
    "log-probabilities": (chat(logprobs=True), "logprobs"),
    "a penalty": (chat(presence_penalty=0.5), "presence_penalty"),
    "tools": (chat(tools=[{"type": "function"}]), "tools"),
    "an answer in JSON": (chat(response_format={"type": "json_object"}), "response_format.type"),
    "metadata that is no text": (chat(metadata={"a": 1}), "metadata.a"),
    "an unknown field": (chat(temprature=1.0), "temprature"),
    "transport as text": (chat(transport="much"), "transport"),
    "transport with an unknown field": (moved(nat=1.0), "transport.nat"),
    "nats negative": (moved(nats=-1), "transport.nats"),
    "nats huge": (moved(nats=1e9), "transport.nats"),
    "nats an integer without end": (moved(nats=10**400), "transport.nats"),
    "nats as text": (moved(nats="4"), "transport.nats"),
    "steps negative": (moved(steps=-1), "transport.steps"),
    "steps over the limit": (moved(steps=9), "transport.steps"),
    "steps as true": (moved(steps=True), "transport.steps"),
    "step unknown": (moved(step="newton"), "transport.step"),
    "step_size 0": (moved(step_size=0), "transport.step_size"),
    "step_size huge": (moved(step_size=1e30), "transport.step_size"),
    "transport temperature next to nothing": (moved(temperature=1e-300), "transport.temperature"),
    "kernel unknown": (moved(kernel="cosine"), "transport.kernel"),
    "a kernel with a decoder that cannot": (moved(kernel="rbf", decoder="pivot"), "kernel"),
    "bandwidth negative": (moved(bandwidth=-1.0), "transport.bandwidth"),
    "max_token_nats 0": (moved(max_token_nats=0), "transport.max_token_nats"),
    "rounds 0": (moved(rounds=0), "transport.rounds"),
    "rounds over the limit": (moved(rounds=5), "transport.rounds"),
    "no particle": (moved(num_particles=0), "transport.num_particles"),
    "particles over the limit": (moved(num_particles=9), "transport.num_particles"),
    "a fraction of a draw": (moved(draws=1.5), "transport.draws"),
    "draws over the limit": (moved(draws=5), "transport.draws"),
    "decoder unknown": (moved(decoder="beam"), "transport.decoder"),
    "select unknown": (moved(select="best"), "transport.select"),
    "no time": (moved(timeout_sec=0), "transport.timeout_sec"),
    "time over the limit": (moved(timeout_sec=1e6), "transport.timeout_sec"),
    "nats not a number": (json.dumps(moved(nats=float("nan"))).encode(), "transport.nats"),
    "nats infinite": (json.dumps(moved(nats=float("inf"))).encode(), "transport.nats"),
    "temperature that overflows": (b'{"model": "tiny", "messages": [], "temperature": 1e999}', "temperature"),
    "invalid UTF-8": (b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff\xfe"}]}', "body"),
    "half a surrogate": (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "body"),
    "no JSON": (b"model=tiny", "body"),
    "half of the JSON": (b'{"model": "tiny", "messages": [', "body"),
    "nothing": (b"", "body"),
    "a list": (b"[]", "body"),
    "nested without end": (b"[" * 10000, "body"),
    "an oversized body": (chat("x" * 20000), "body"),
    "top_k that no tensor holds": (chat(top_k=2**64, transport={"steps": 0, "num_particles": 1}), "top_k"),
    "max_tokens that no tensor holds": (chat(max_tokens=2**64), "max_tokens"),
    "steps that no tensor holds": (moved(steps=2**64), "transport.steps"),
    "a key twice": (b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "seed": 1, "seed": 2}', "seed"),
    "a key twice in transport": (
        b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "transport": {"nats": 1, "nats": 2}}',
        "nats",
    ),
    "an endless field": (chat(**{"x" * 9000: 1}), "x" * 80),
    "messages without end": (chat() | {"messages": [{}] * 3000}, "messages"),
    "characters without end": (chat("x" * 10000), "messages"),
    "a prompt too long, as a stream": (chat("sea " * 500, stream=True), "messages"),
}

BAD_TEXTS = {
    "no prompt": ({"model": MODEL}, "prompt"),
    "an empty prompt": ({"model": MODEL, "prompt": ""}, "prompt"),
    "several prompts": ({"model": MODEL, "prompt": ["a", "b"]}, "prompt"),
    "a token that the model does not know": ({"model": MODEL, "prompt": [1, 99999]}, "prompt"),
    "a negative token": ({"model": MODEL, "prompt": [1, -2]}, "prompt"),
    "messages": ({"model": MODEL, "prompt": "a", "messages": []}, "messages"),
    "echo": ({"model": MODEL, "prompt": "a", "echo": True}, "echo"),
    "a token that no tensor holds": ({"model": MODEL, "prompt": [2**70]}, "prompt"),
    "a prompt too long": ({"model": MODEL, "prompt": [1] * 200}, "prompt"),
}
BAD = [(CHAT, name, *case) for name, case in BAD_CHATS.items()]
BAD += [(TEXT, name, *case) for name, case in BAD_TEXTS.items()]


@pytest.mark.parametrize("path, name, body, field", BAD, ids=[f"{path[4:8]}: {name}" for path, name, *_ in BAD])
def test_a_bad_request_is_told_what_is_wrong_and_the_next_one_is_answered(running, path, name, body, field):
    with running.http() as http:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        told = http.post(path, content=content, headers=JSON)
        assert 400 <= told.status_code < 500, told.text
        error = told.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert field in error["message"], error
        assert len(error["message"]) < 500 and len(error["param"] or "") <= 80
        assert field == "body" or error["param"] is None or error["param"].startswith(field.partition("[")[0])
        assert http.post(CHAT, json=chat(max_tokens=2, transport={"steps": 0, "num_particles": 1})).status_code == 200


def test_there_are_at_least_forty_bad_requests():
    assert len(BAD) >= 40


def test_the_value_and_the_limit_are_named(running):
    with running.http() as http:

        def told(body):
            return http.post(CHAT, json=body).json()["error"]["message"]

        assert told(moved(nats=99)) == "transport.nats must be at most 16 here, got 99"
        assert told(moved(nats="4")) == "transport.nats must be a valid number, got '4'"
        assert told(moved(nat=4)) == "transport.nat is unknown; did you mean nats?"
        assert told(chat(temprature=1)) == "temprature is unknown; did you mean temperature?"
        assert told(chat("sea " * 500)) == "messages has 502 tokens and may have 119 with 8 new ones; shorten it"


def test_paths_methods_and_content_types(running):
    with running.http() as http:
        found = [
            (404, "GET /v1/embeddings", http.get("/v1/embeddings")),
            (404, "GET /health/", http.get("/health/")),
            (405, "GET /v1/chat/completions", http.get(CHAT)),
            (415, "Content-Type must be", http.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"})),
            (404, "'other' is not served; there is 'tiny'", http.post(CHAT, json=chat() | {"model": "other"})),
        ]
    for status, said, told in found:
        assert told.status_code == status and said in told.json()["error"]["message"]


def test_a_body_without_end_is_cut_off(running):
    """A chunked body states no length: no more of it is read than a body may have."""
    sent = 0

    def endless():
        nonlocal sent
        while sent < 100_000_000:
            sent += 4096
            yield b" " * 4096

    import httpx

    with running.http() as http:
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # hung up on before the answer was read
            assert http.post(CHAT, content=endless(), headers=JSON).status_code == 413
        assert sent < 50_000_000
        assert http.post(CHAT, json=chat(max_tokens=2)).status_code == 200


def test_a_key_is_asked_for_where_there_is_one(served_pipeline):
    with serving(served_pipeline, api_key="a secret") as own, own.http() as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "a secret"}):
            for told in (http.post(CHAT, json=chat(), headers=headers), http.get("/v1/models", headers=headers)):
                assert told.status_code == 401 and told.json()["error"]["type"] == "authentication_error"
                assert "Authorization" in told.json()["error"]["message"] and "a secret" not in told.text
        for given in ("Bearer ünknown".encode(), b"Bearer a secret\xa0"):
            assert http.post(CHAT, json=chat(), headers=[(b"Authorization", given)]).status_code == 401
        good = {"Authorization": "Bearer a secret"}
        assert http.post(CHAT, json=chat(max_tokens=2), headers=good).status_code == 200
        assert http.get("/health").status_code == http.get("/metrics").status_code == 200
