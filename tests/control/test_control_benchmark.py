"""The speed benchmark on networks small enough for a test."""

import json

from benchmarks import control


def test_benchmark_prints_its_figures(capsys):
    control.main(
        ["--sizes", "8", "8", "--batch-size", "4", "--particles", "2", "--euler-steps", "2", "--repetitions", "2"]
    )
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures["steps_over_plain"]["wall"]) == {
        "no transport",
        "1 flow step",
        "1 flow step, cached",
        "no transport, cached",
    }
    assert set(figures["growth_by_particles"]["processor"]) == {"1", "5", "10", "20"}
    assert all(low <= median <= high for low, median, high in figures["growth_by_flow_steps"]["wall"].values())
