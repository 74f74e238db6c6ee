"""What best-of-N gives at an arm's cost: against all subsets, and by hand."""

from __future__ import annotations

from itertools import combinations

import pytest

from benchmarks.decoder_matches import best_of_n, matched, matched_count, matched_markdown

VALUES = [0.3, -1.0, 2.5, 0.9, -0.2, 1.7]
GOLD = [0.1, 0.9, 0.4, -0.7, 0.6, 0.2]


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_is_the_mean_over_all_subsets(n):
    subsets = list(combinations(range(6), n))
    brute = sum(GOLD[max(subset, key=lambda index: VALUES[index])] for subset in subsets) / len(subsets)
    assert best_of_n(VALUES, GOLD, n) == pytest.approx(brute, abs=1e-12)


def test_best_of_one_is_the_mean_and_best_of_all_the_argmax():
    assert best_of_n(VALUES, GOLD, 1) == pytest.approx(1.5 / 6)
    assert best_of_n(VALUES, GOLD, 6) == pytest.approx(0.4)


@pytest.mark.parametrize("n", [0, 7, -1])
def test_n_out_of_range_is_refused(n):
    with pytest.raises(ValueError, match=f"n must be from 1 to 6, got {n}"):
        best_of_n(VALUES, GOLD, n)


@pytest.mark.parametrize(("cost", "count"), [(0.1, 1), (2.0, 1), (2.1, 2), (4.0, 2), (7.9, 4), (8.0, 4), (80.0, 4)])
def test_cost_is_rounded_up_to_samples_and_ends_at_all_of_them(cost, count):
    """Four samples for 8 TFLOP: 2 each."""
    assert matched_count(cost, {"proxy": [0.0] * 4, "tflops": 8.0}, "tflops") == count


def made_up_rows() -> list[dict]:
    """Two prompts: four base samples of 2 TFLOP each, and an arm that costs 4 on the first and 12 on the second."""
    base = {"arm": "best-of-4", "seed": 0, "tflops": 8.0, "selected_proxy": 4.0, "selected_nll": 2.0}
    first = base | {"prompt_index": 0, "proxy": [1.0, 2.0, 3.0, 4.0], "gold": [0.0, 0.0, 0.6, 1.2], "nll": [2.0] * 4}
    second = base | {"prompt_index": 1, "proxy": [4.0, 3.0, 2.0, 1.0], "gold": [0.5, 0.0, 0.0, 0.0], "nll": [1.0] * 4}
    arm = {"arm": "moved", "seed": 0, "selected_gold": 1.0, "selected_proxy": 5.0, "selected_nll": 2.5}
    return [
        first | {"selected_gold": 1.2},
        second | {"selected_gold": 0.5},
        arm | {"prompt_index": 0, "tflops": 4.0},
        arm | {"prompt_index": 1, "tflops": 12.0},
        arm | {"prompt_index": 2, "tflops": 4.0},  # no base samples: not counted
    ]


def test_an_arm_is_held_against_best_of_n_at_its_own_flops():
    """By hand.

    First prompt: 4 TFLOP buy n = 2 of 4; the six pairs have maxima 4, 4, 4, 3, 3, 2, so the proxy is 20 / 6 and the
    gold (3 * 1.2 + 2 * 0.6) / 6 = 0.8: differences 5 - 10 / 3 and 0.2. Second prompt: 12 TFLOP are more than all four
    cost, so n = 4 and gold 0.5, proxy 4: differences 0.5 and 1. NLL: 2.5 - 2 and 2.5 - 1.
    """
    found = matched(made_up_rows(), "best-of-4")["moved"]
    assert (found["n"], found["over"], found["prompts"]) == (3.0, 0.5, 2)
    assert found["selected_gold"]["mean"] == pytest.approx((0.2 + 0.5) / 2)
    assert found["selected_proxy"]["mean"] == pytest.approx((5 - 10 / 3 + 1) / 2)
    assert found["selected_nll"]["mean"] == pytest.approx((0.5 + 1.5) / 2)
    assert found["selected_gold"]["low"] == pytest.approx(0.2) and found["selected_gold"]["high"] == pytest.approx(0.5)


def test_the_base_arm_is_level_with_itself_and_the_table_says_who_was_over():
    found = matched(made_up_rows(), "best-of-4")
    assert found["best-of-4"]["n"] == 4 and found["best-of-4"]["over"] == 0
    assert found["best-of-4"]["selected_gold"]["mean"] == pytest.approx(0)
    table = matched_markdown(found)
    assert "| moved | 2 | 3 (50% above the largest) | **+0.350 [+0.200, +0.500]** |" in table
    assert "| best-of-4 | 2 | 4 | +0.000 [+0.000, +0.000] |" in table
