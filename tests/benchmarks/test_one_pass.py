"""The figures of the one-pass comparison, on made-up rows."""

import pytest

from benchmarks.one_pass import summary


def row(arm, prompt, values, nats):
    return {"arm": arm, "prompt": prompt, "values": values, "nats": nats, "nll": [1.0, 1.0]}


def rows_of(prior_gain):
    found = []
    for prompt in range(4):
        found.append(row("plain", prompt, [0.0, 2.0], [0.0, 0.0]))
        found.append(row("prior 1", prompt, [prior_gain, 2 + prior_gain], [1.0, 1.0]))
        found.append(row("prior 4", prompt, [2 * prior_gain, 2 + 2 * prior_gain], [4.0, 4.0]))
        found.append(row("lookahead 2", prompt, [1.5, 3.5], [2.25, 2.25]))
    return found


def test_figures_by_hand():
    """sigma^2 of [0, 2] is 2; at 2.25 nats prior's gain is read between 1 at sqrt(1) and 2 at sqrt(4): 1.5."""
    found = summary(rows_of(1.0))
    assert found["sigma"] == pytest.approx(2**0.5, abs=1e-4)
    one = found["arms"]["lookahead 2"]
    assert one["gain"] == [1.5, 1.5, 1.5] and one["nats"] == 2.25
    assert one["eta"][0] == pytest.approx(1.5 / (2**0.5 * 4.5**0.5), abs=1e-3)
    assert one["gain_per_nat_ratio"] == pytest.approx(1.0)
    assert found["arms"]["prior 1"]["eta"][0] == pytest.approx(0.5)


def test_there_is_no_ratio_to_a_gain_of_nothing():
    assert "gain_per_nat_ratio" not in summary(rows_of(0.0))["arms"]["lookahead 2"]
