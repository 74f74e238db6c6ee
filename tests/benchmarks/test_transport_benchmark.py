"""The cost benchmark runs and prints its figures; how fast it is depends on the machine and is not asserted."""

import json

import torch

from benchmarks.transport import main, peak_bytes


def test_the_last_line_holds_the_named_figures(capsys):
    threads = torch.get_num_threads()
    main("--shape tiny --prompt-tokens 16 --response-tokens 6 --particles 3 --repetitions 2 --threads 1".split())
    torch.set_num_threads(threads)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == {
        "flow_step_over_bare",
        "prefix_cache_speedup",
        "peak_memory_growth_per_step",
        "spread",
        "setting",
        "hardware",
        "versions",
        "command",
    }
    assert figures["flow_step_over_bare"] > 0 and figures["prefix_cache_speedup"] > 0
    assert abs(figures["peak_memory_growth_per_step"]) < 0.005
    assert figures["spread"]["repetitions"] == 2 and figures["setting"]["shape"] == "tiny"


def test_peak_bytes_counts_what_lives_at_once():
    """Two float32 tensors of 1000 at once, then one freed before a third comes: the peak is 8000 bytes."""

    def work():
        first = torch.empty(1000)
        second = torch.empty(1000)
        del first
        third = torch.empty(1000)
        del second, third

    assert peak_bytes(work) == 8000
