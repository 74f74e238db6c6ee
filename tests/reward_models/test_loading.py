"""LoRA or full, saved or merged, a reward model scores the same; a foreign tokenizer is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from reward_models.card import RewardCard, write_card
from reward_models.loading import add_lora, load_reward_model, reward_model, save_reward_model
from reward_models.modelling import RewardModel
from vgf_llm.errors import ModelError
from vgf_llm.models.loading import fingerprint

PROMPTS = [[5, 6, 7], [10, 11]]
TOKENS = torch.tensor([[[12, 13], [15, 2]], [[16, 2], [18, 19]]])
MASK = torch.ones(2, 2, 2, dtype=torch.bool)


def scores(model):
    with torch.no_grad():
        return model.score(model.prefix(PROMPTS), TOKENS, MASK)


@pytest.fixture
def moved_lora(any_lm):
    """A LoRA whose adapters and head have left their initial values."""
    model = add_lora(RewardModel.from_base(any_lm, num_layers=1), r=2, alpha=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def test_lora_saved_and_loaded_scores_the_same_merged_or_not(any_lm, moved_lora, tmp_path):
    expected = scores(reward_model(moved_lora))
    save_reward_model(moved_lora, tmp_path)
    for merge in (False, True):
        loaded = load_reward_model(tmp_path, base=any_lm, merge=merge)
        assert isinstance(loaded, RewardModel)
        torch.testing.assert_close(scores(loaded), expected, atol=1e-5, rtol=0)
        assert not any(p.requires_grad for p in loaded.parameters())
    fresh = RewardModel.from_base(any_lm, num_layers=1)
    assert (scores(fresh) - expected).abs().max() > 1e-3


def test_a_merged_lora_saves_as_a_full_model(any_lm, moved_lora, tmp_path):
    save_reward_model(moved_lora, tmp_path / "lora")
    merged = load_reward_model(tmp_path / "lora", base=any_lm)
    save_reward_model(merged, tmp_path / "full")
    torch.testing.assert_close(scores(load_reward_model(tmp_path / "full")), scores(merged), atol=1e-6, rtol=0)


def test_only_adapters_and_head_are_trainable_and_a_wrong_target_is_named(any_lm):
    model = RewardModel.from_base(any_lm, num_layers=1)
    with pytest.raises(ModelError, match="'q_prj' is not a linear layer of the body; it has"):
        add_lora(model, r=2, alpha=4, target_modules=["q_prj"])
    adapted = add_lora(model, r=2, alpha=4)
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name or "head" in name for name in trainable)
    assert any("head" in name for name in trainable)


def test_folders_that_are_no_reward_model_are_refused(tiny_lm, tmp_path):
    with pytest.raises(ModelError, match="has no config.json"):
        load_reward_model(tmp_path / "nothing")
    tiny_lm.save_pretrained(tmp_path / "lm")
    with pytest.raises(ModelError, match="is not of a reward model"):
        load_reward_model(tmp_path / "lm")
    model = RewardModel.from_base(tiny_lm, num_layers=1)
    model.config.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="holds no weights"):
        load_reward_model(tmp_path / "bare")


def test_the_cards_fingerprint_is_checked_when_a_tokenizer_is_given(
    tiny_lm, tiny_tokenizer, tiny_plain_tokenizer, tmp_path
):
    save_reward_model(RewardModel.from_base(tiny_lm, num_layers=1), tmp_path)
    prints = fingerprint(tiny_tokenizer)
    card = RewardCard("tiny", 1, "last", False, prints.tokenizer, prints.template, True, 64, 1, 0)
    write_card(card, tmp_path)
    load_reward_model(tmp_path, tokenizer=tiny_tokenizer)
    with pytest.raises(ModelError, match="the chat template differs"):
        load_reward_model(tmp_path, tokenizer=tiny_plain_tokenizer)
    write_card(dataclasses.replace(card, tokenizer_sha256="0" * 64), tmp_path)
    with pytest.raises(ModelError, match="the tokenizer differs"):
        load_reward_model(tmp_path, tokenizer=tiny_tokenizer)


def test_without_a_card_the_tokenizer_beside_the_weights_is_compared(
    tiny_lm, tiny_tokenizer, tiny_plain_tokenizer, tmp_path, capsys
):
    save_reward_model(RewardModel.from_base(tiny_lm, num_layers=1), tmp_path)
    load_reward_model(tmp_path, tokenizer=tiny_plain_tokenizer)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert str(tmp_path) in warning and "neither reward_card.json nor a tokenizer" in warning
    tiny_tokenizer.save_pretrained(tmp_path)
    load_reward_model(tmp_path, tokenizer=tiny_tokenizer)
    assert "warning" not in capsys.readouterr().err
    with pytest.raises(ModelError, match="the chat template differs .* tokenizer beside the weights"):
        load_reward_model(tmp_path, tokenizer=tiny_plain_tokenizer)


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", '{"model_type": "vgf_rew'), ("config.json", "[]"), ("config.json", "")]
)
def test_a_torn_config_is_named(tiny_lm, tmp_path, name, content):
    save_reward_model(RewardModel.from_base(tiny_lm, num_layers=1), tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=name):
        load_reward_model(tmp_path)


def test_torn_weights_are_named(tiny_lm, tmp_path):
    save_reward_model(RewardModel.from_base(tiny_lm, num_layers=1), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="holds no weights"):
        load_reward_model(tmp_path)
