"""The cost benchmark runs on a tiny model and counts what it should; how fast it is depends on the machine."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import decoder_cost
from benchmarks.cost_models import TINY, cost_arms, random_models
from benchmarks.decoder_cost import decoder_costs, exponent, growth, main, quartiles
from benchmarks.decoder_profile import named_stages, profile_stages, prompt_cache
from vgf_llm.errors import ConfigError


@pytest.fixture
def tiny_models():
    return random_models(TINY, 64, layers=2, dtype="float32", prompts=2, tokens=6)


def small_arms(*names: str):
    return cost_arms(list(names), 0.1, particles=2)


def test_the_last_line_holds_the_named_figures(capsys, monkeypatch):
    monkeypatch.setattr(decoder_cost, "GROWTH", {"N": (2, 4), "T": (4, 8), "L": (1, 2)})
    monkeypatch.setattr(decoder_cost, "TINY_VOCABULARIES", (64, 128))
    main("--tiny --repetitions 1 --decoders prior,nearest".split())
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    sections = {"decoders", "growth", "profile", "prompt_cache", "setting", "hardware", "command", "wall_sec"}
    assert set(figures) == sections
    assert list(figures["decoders"]) == ["sampling", "best-of-8", "prior, 1 draw", "prior, 3 draws", "nearest"]
    assert figures["decoders"]["prior, 3 draws"]["responses"] == 24
    assert set(figures["growth"]) == {"N", "T", "L", "V"}
    assert len(figures["profile"]["largest"]) == 3
    assert sum(figures["profile"]["shares"].values()) == pytest.approx(1, abs=0.01)


def test_flops_a_response_follow_the_formula(tiny_models):
    """2 FLOPs a parameter and token: 6 sampled, 6 rewritten for each text, and the prompt's 20 once for all of them.

    The value costs a forward for best-of-2; for `prior` a flow (2 forwards) an original and a forward a text.
    """
    costs = decoder_costs(tiny_models, small_arms("prior"), 1)
    reference, value, prompt = tiny_models.sizes.reference, tiny_models.sizes.value, 20
    best = 2 * (reference * (6 + prompt / 2) + value * (6 + prompt / 2)) / 1e12
    prior = 2 * (reference * (12 + prompt / 2) + value * (3 * 6 + prompt / 2)) / 1e12
    three = 2 * (reference * (6 / 3 + 6 + prompt / 6) + value * (2 * 6 / 3 + 6 + prompt / 6)) / 1e12
    assert costs["best-of-2"]["tflop_a_response"] == pytest.approx(best, rel=1e-3)
    assert costs["prior, 1 draw"]["tflop_a_response"] == pytest.approx(prior, rel=1e-3)
    assert costs["prior, 3 draws"]["tflop_a_response"] == pytest.approx(three, rel=1e-3)
    assert all(one["peak_mib"] >= 0 and len(one["seconds_a_response"]) == 3 for one in costs.values())


@pytest.mark.parametrize("name", ["block", "pivot", "edit", "edit_greedy"])
def test_every_decoder_runs_where_no_response_ends(name, tiny_models):
    arm = small_arms(name)[1]
    outcome = tiny_models.answer(arm, tokens=4)
    assert outcome.transported.lengths_BN.eq(4).all() and outcome.transported.lengths_BN.shape == (2, 2)
    assert tiny_models.tflops(arm, outcome) > 0


def test_flops_grow_linearly_in_the_particles(tiny_models, monkeypatch):
    """8 times the particles cost 8 times as much but for the prompt, so the exponent is below 1."""
    monkeypatch.setattr(decoder_cost, "GROWTH", {"N": (2, 16)})
    found = growth(tiny_models, {}, small_arms("prior")[1], 1)["N"]
    assert 0.6 < found["tflop_exponent"] < 1 and found["sizes"] == [2, 16]


def test_both_models_process_a_prompt_once(tiny_models):
    """20 prompt tokens; the reference gets the last one again with 2 originals and 2 * 3 texts: 20 + 8."""
    counts = prompt_cache(tiny_models, small_arms("prior")[2])
    assert counts["value"]["prompt_tokens_fed"] == 20
    assert counts["reference"]["prompt_tokens_fed"] == 28
    assert counts["reference"]["times_processed_but_last_token"] == 1
    assert counts["reference"]["tokens_fed"] == 20 + 8 * 6  # the response's own last token is never fed


def test_stages_change_nothing_and_are_gone_afterwards(tiny_models):
    arm = small_arms("prior")[1]
    plain = tiny_models.answer(arm)
    with named_stages(tiny_models):
        staged = tiny_models.answer(arm)
    assert torch.equal(plain.transported.tokens_BNT, staged.transported.tokens_BNT)
    assert "forward" not in vars(tiny_models.model) and "score_with_hidden" not in vars(tiny_models.value)
    shares = profile_stages(tiny_models, arm)["shares"]
    named = {"reference: logits", "reference: attention", "value", "noise", "top-k and log-softmax", "prompts, once"}
    assert named <= set(shares)


def test_exponents_and_quartiles_by_hand():
    assert exponent([1, 2, 4], [3.0, 12.0, 48.0]) == 2
    assert quartiles([1.0, 2.0, 3.0]) == [1.5, 2.0, 2.5] and quartiles([2.0]) == [2.0, 2.0, 2.0]


def test_an_unknown_decoder_is_named():
    with pytest.raises(ConfigError, match="'greedy' is no decoder here"):
        cost_arms(["greedy"], 0.1)
