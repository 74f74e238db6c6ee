"""The gold column of the Pythia recipes scores as training did, for every pooling, and says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from recipes import held_out
from reward_models.loading import save_reward_model
from reward_models.modelling import RewardModel
from reward_models.pairs import PairCollator, encode_pairs
from tests.conftest import build_neox
from vgf_llm.data.prompts import PreferencePair
from vgf_llm.errors import ModelError

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True)
def _fresh():
    held_out._load.cache_clear()


@pytest.mark.parametrize("kind", [{}, {"pooling": "mean"}, {"input_skip": True}])
def test_it_scores_as_training_does_and_leaves_a_cut_response_open(kind, tiny_plain_tokenizer, tmp_path):
    model = RewardModel.from_base(build_neox(), num_layers=1, **kind)
    if model.skip_head is not None:
        torch.nn.init.normal_(model.skip_head.weight)
    save_reward_model(model, tmp_path)
    tiny_plain_tokenizer.save_pretrained(tmp_path)
    pairs = [PreferencePair("write about tea", "good", "a very old dog"), PreferencePair("the sea", "blue", "red")]
    encoded, _ = encode_pairs(tiny_plain_tokenizer, pairs, 64, max_response_length=4)
    assert encoded[0].rejected[-1] != tiny_plain_tokenizer.eos_token_id
    batch = PairCollator(0)(encoded)
    batch.pop("margin")
    with torch.no_grad():
        expected = model(**batch).tolist()
    prompts = [pair.prompt for pair in pairs] * 2
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    assert held_out.score(tmp_path, prompts, responses, 4) == pytest.approx(expected, abs=1e-5)
    closed = held_out.score(tmp_path, prompts, responses)
    assert closed[2] != pytest.approx(expected[2], abs=1e-5) and closed[3] == pytest.approx(expected[3], abs=1e-5)


def test_a_model_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="'outputs/pythia_tldr/held_out' is not there .* train it first"):
        held_out.tldr(["a"], ["b"])


@pytest.mark.parametrize(("task", "tokens"), [("tldr", held_out.TLDR_TOKENS), ("hh", held_out.HH_TOKENS)])
def test_the_room_of_a_response_is_that_of_the_recipe(task, tokens):
    recipe = yaml.safe_load((RECIPES / f"pythia_{task}" / "evaluate.yaml").read_text())
    assert recipe["max_new_tokens"] == tokens
