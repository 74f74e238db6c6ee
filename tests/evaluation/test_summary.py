"""Intervals, paired differences, FLOPs and text measures, by hand."""

import pytest
import torch

from vgf_llm.evaluation.arms import Arm, budget_arms
from vgf_llm.evaluation.flops import PromptWork, Sizes, arm_flops
from vgf_llm.evaluation.measures import non_ascii, repetition
from vgf_llm.evaluation.summary import at_equal_cost, differences, summarise
from vgf_llm.evaluation.table import difference_table, equal_cost_lines, markdown_table, part_lines, print_table
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.text.responses import Responses, changed_tokens


def row(arm, seed, prompt, gold, nats=0.0, **changes):
    values = {
        "arm": arm, "seed": seed, "prompt_index": prompt, "proxy": [gold, gold], "gold": [gold, gold + 0.2],
        "nll": [2.0, 1.0], "tokens": [30, 10], "nats": None if nats is None else [nats, nats], "changed": [0, 4],
        "displacement": [0.0, 1.0], "ended": [True, False], "repetition": [0.0, 0.5], "non_ascii": [0.0, 0.0],
        "selected_proxy": gold, "selected_gold": gold, "selected_nll": 1.5, "tflops": 0.5, "seconds": 2.0,
    }  # fmt: skip
    return values | changes


def test_summary_averages_seeds_within_a_prompt_first():
    """Prompt 0 has golds 0.1 + 0.2/2 = 0.2 and 0.4 + 0.1 = 0.5 at two seeds, prompt 1 has 0.7: mean of 0.35 and 0.7."""
    rows = [row("a", 0, 0, 0.1), row("a", 1, 0, 0.4), row("a", 0, 1, 0.6)]
    entry = summarise(rows, ["a", "absent"])["a"]
    assert entry["gold"]["mean"] == pytest.approx((0.35 + 0.7) / 2)
    assert entry["nll"]["mean"] == pytest.approx((2.0 * 30 + 1.0 * 10) / 40)
    assert (entry["prompts"], entry["seeds"]) == (2, 2)
    assert entry["eos_rate"]["mean"] == 0.5


def test_components_of_the_gold_are_means_over_what_was_scored():
    """Right: 1 and none of two at prompt 0, 0 and 1 at prompt 1: (1 + 0.5) / 2. The last of a row is the selected."""
    parts = [{"right": [1.0, None, 0.0], "never": [None] * 3}, {"right": [0.0, 1.0, 0.0], "never": [None] * 3}]
    rows = [row("a", 0, prompt, 0.1, gold_parts=found) for prompt, found in enumerate(parts)]
    entry = summarise(rows, ["a"])["a"]
    assert entry["gold.right"]["mean"] == pytest.approx(0.75) and entry["gold.right"]["scored"] == 0.75
    assert entry["gold.never"] is None
    assert part_lines({"a": entry, "b": summarise([row("b", 0, 0, 0.1)], ["b"])["b"]}) == [
        "a: gold.never -, gold.right 0.750 [0.500, 1.000] (of 75% of the responses)"
    ]


def test_differences_pair_on_common_seeds_only():
    """Arm b has seed 0 only; seed 1 of the baseline must not enter."""
    rows = [row("a", 0, 0, 0.1), row("a", 1, 0, 9.0), row("b", 0, 0, 0.4), row("a", 0, 1, 0.0), row("b", 0, 1, 0.5)]
    result = differences(rows, ["a", "b"], "a")
    assert set(result) == {"b"}
    assert result["b"]["gold"]["mean"] == pytest.approx(0.4)
    assert result["b"]["gold"]["low"] > 0


def test_tables_hold_every_arm_and_a_dash_where_there_is_no_distribution(capsys):
    rows = [row("base", 0, p, 0.1 * p) for p in range(3)] + [row("nearest", 0, p, 0.2, nats=None) for p in range(3)]
    summary = summarise(rows, ["base", "nearest"])
    assert summary["nearest"]["nats"] is None
    text = markdown_table(summary)
    assert text.count("\n") == 3 and " - |" in text.splitlines()[3]
    assert "nearest" in difference_table(differences(rows, ["base", "nearest"], "base"))
    print_table(summary, "title")
    assert "nearest" in capsys.readouterr().err


def test_flops_by_hand():
    """P_ref 100, P_val 10, V*D 40, N 2, S 3, T 5: sampling 2*100*(10+3) = 2600, value 2*10*(10+3) = 260."""
    sizes = Sizes(reference=100, value=10, table=40)
    assert arm_flops(Arm(num_particles=2), sizes, 3, 10, PromptWork(reference=0, value=10, table=0)) == 2860
    prior = Arm(num_particles=2, budget=TransportBudget(steps=2))
    # flow 4*10*10*2 = 800, decode 2*100*10 = 2000, new scores 2*10*10 = 200, prompt 2*(100+10)*3 = 660
    assert arm_flops(prior, sizes, 3, 10, PromptWork(reference=10, value=40 + 10, table=0)) == 2000 + 3000 + 660
    nearest = Arm(num_particles=2, decoder="nearest", budget=TransportBudget())
    assert arm_flops(nearest, sizes, 3, 10, PromptWork(0, 30, 10)) == 2000 + 600 + 2 * 40 * 10 + 660
    assert arm_flops(Arm(num_particles=2, select="random"), sizes, 3, 10, PromptWork(0, 10, 0)) == 2 * 100 * 8


def test_sizes_count_a_tied_table_once_and_an_untied_lookup_not_at_all(tiny_lm, tiny_lm_untied):
    from reward_models.modelling import RewardModel

    for lm in (tiny_lm, tiny_lm_untied):
        value = RewardModel.from_base(lm, num_layers=1)
        sizes, table = Sizes.of(lm, value), lm.get_input_embeddings().weight.numel()
        everything = sum(p.numel() for p in lm.parameters())
        assert sizes.table == table
        assert sizes.reference == everything - (0 if lm is tiny_lm else table)
        assert sizes.value == sum(p.numel() for p in value.parameters()) - table


def test_changed_tokens_counts_positions_and_lengths():
    def responses(rows):
        tokens = torch.tensor([rows])
        return Responses([[1]], tokens, tokens != 0, (2,), 0)

    before = responses([[5, 6, 7, 2], [5, 6, 2, 0]])
    after = responses([[5, 9, 7, 2, 0], [5, 6, 8, 8, 2]])
    assert changed_tokens(before, after).tolist() == [[1, 3]]


def test_text_measures():
    assert repetition("a b a b a b") == pytest.approx(1 - 2 / 5)
    assert repetition("word") == 0.0
    assert non_ascii(["abc", "aé", ""]) == [0.0, 0.5, 0.0]


def test_budget_arms_have_unique_names():
    arms = budget_arms(
        4, 2, [4, 8], [TransportBudget(nats=2), TransportBudget(nats=2, steps=3), TransportBudget.none()]
    )
    assert [arm.name for arm in arms] == [
        "base",
        "best-of-4",
        "best-of-8",
        "2 nats",
        "2 nats (3 sgd steps)",
        "zero budget",
    ]
    with pytest.raises(ValueError, match="num_particles must be at least 1, got 0"):
        Arm(num_particles=0)


def test_an_arm_is_compared_with_the_cheapest_best_of_n_that_costs_as_much():
    """The arm costs 1.0; best-of-8 costs half of it, best-of-16 1.2 times, best-of-64 four times: 16 is equal cost.

    Gold of the arm minus best-of-16 is 0.5 - 0.3 at both prompts.
    """
    costs = {"2 nats": 1.0, "best-of-8": 0.5, "best-of-16": 1.2, "best-of-64": 4.0}
    golds = {"2 nats": 0.5, "best-of-8": 0.1, "best-of-16": 0.3, "best-of-64": 0.9}
    rows = [row(arm, 0, p, golds[arm], tflops=cost) for arm, cost in costs.items() for p in (0, 1)]
    found = at_equal_cost(rows, ["best-of-8", "best-of-16", "best-of-64"], ["2 nats"])["2 nats"]
    assert found["than"] == "best-of-16" and found["tflops"] == pytest.approx(1.2)
    assert found["selected_gold"]["mean"] == pytest.approx(0.2)
    (line,) = equal_cost_lines({"2 nats": found})
    assert line.startswith("2 nats - best-of-16 (of 1.20 times its FLOPs): gold +0.200 [+0.200, +0.200]")
    assert line.endswith("better")


def test_where_no_best_of_n_is_dear_enough_the_dearest_stands_and_says_so():
    rows = [row("2 nats", 0, 0, 0.5, tflops=10.0)] + [row(f"best-of-{n}", 0, 0, 0.5, tflops=n) for n in (2, 5)]
    found = at_equal_cost(rows, ["best-of-2", "best-of-5"], ["2 nats", "absent"])
    assert set(found) == {"2 nats"} and found["2 nats"]["than"] == "best-of-5"
    assert found["2 nats"]["tflops"] == pytest.approx(0.5)
    assert equal_cost_lines(found)[0].endswith("no difference shown")


def test_the_table_of_a_terminal_has_intervals_on_what_is_compared(capsys):
    rows = [row("base", 0, p, 0.1 * p) for p in range(5)]
    print_table(summarise(rows, ["base"]), "one arm")
    shown = "".join(capsys.readouterr())
    assert shown.count("[") == 3  # mean gold, value and gold; the likelihoods are all the same
