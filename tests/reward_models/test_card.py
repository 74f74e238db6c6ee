"""The card's figures by hand, and its files."""

from __future__ import annotations

import pytest

from reward_models.card import (
    RewardCard,
    card_markdown,
    card_rows,
    pair_figures,
    pearson_correlation,
    read_card,
    write_card,
)
from vgf_llm.errors import ModelError


def test_pair_figures_by_hand():
    """A loss at margin 1, wins at 2 and 3. Scores 1, 3, 0, 2, 1, -0.5: sum 6.5, sum of squares 15.25."""
    figures = pair_figures([1.0, 3.0, 0.0], [2.0, 1.0, -0.5], [1.0, 2.0, 3.0], [1, 3, 0, 2, 1, 0])
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert list(figures["accuracy_by_margin"].values()) == [0, 1, 1]
    assert list(figures["accuracy_by_margin"])[0] == "small (1 to 1)"
    assert figures["score_mean"] == pytest.approx(6.5 / 6)
    assert figures["score_std"] == pytest.approx(((1 + 9 + 0 + 4 + 1 + 0.25) / 6 - (6.5 / 6) ** 2) ** 0.5)
    assert figures["length_correlation"] > 0.9
    assert pair_figures([1.0], [0.0], [None], [2, 2])["accuracy_by_margin"] is None


def test_pearson_by_hand():
    assert pearson_correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert pearson_correlation([1, 2, 3], [1, 1, 1]) is None


def test_a_card_reads_back_and_its_readme_states_scale_and_fingerprints(tmp_path):
    card = RewardCard("base", 2, "mean", False, "a" * 64, "b" * 64, True, 64, 10, 4, accuracy=0.75)
    card.accuracy_interval = (0.3, 0.95)
    card.score_mean, card.score_std = 0.1, 1.5
    card.fidelity = {
        "spearman": 0.4,
        "low": 0.3,
        "high": 0.5,
        "top8_gain": 0.2,
        "best8_gain": 0.6,
        "random8_gain": 0.0,
        "n": 8,
    }
    card.data_files = {"pairs.jsonl": "c" * 64}
    write_card(card, tmp_path)
    again = read_card(tmp_path)
    assert again.accuracy == 0.75 and tuple(again.accuracy_interval) == (0.3, 0.95)
    text = (tmp_path / "README.md").read_text()
    assert text == card_markdown(card)
    for expected in ("higher is better", "0.40 (95% 0.30 to 0.50, 8 responses)", "a" * 64, "b" * 64, "c" * 64):
        assert expected in text


def test_missing_and_foreign_cards_are_refused(tmp_path):
    with pytest.raises(ModelError, match="has no reward_card.json"):
        read_card(tmp_path)
    (tmp_path / "reward_card.json").write_text('{"unknown": 1}')
    with pytest.raises(ModelError, match="not a reward card"):
        read_card(tmp_path)


def test_objectives_are_listed_and_the_score_of_other_figures_is_stated():
    card = RewardCard("base", 2, "mean", False, "a" * 64, "b" * 64, True, 64, 10, 4)
    card.objectives = {"good": {"accuracy": 0.75, "interval": (0.3, 0.95), "pairs": 4}}
    assert dict(card_rows(card))["objective good"] == "accuracy 0.750 (95% 0.300 to 0.950, 4 pairs)"
    assert "score of all other figures" not in dict(card_rows(card)) and "outputs=" not in card_markdown(card)
    card.objectives["rare"] = {"accuracy": None, "interval": None, "pairs": 0}
    assert dict(card_rows(card))["objective rare"] == "not measured"
    assert dict(card_rows(card))["score of all other figures"] == "mean of the 2 objectives (weights 1/2)"
    assert "outputs={'good': 1.0, 'rare': 1.0}" in card_markdown(card)
