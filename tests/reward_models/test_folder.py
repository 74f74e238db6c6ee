"""Training into a folder that an earlier run has used: no remains are read, and a bad input takes nothing away."""

from __future__ import annotations

import json

import pytest

from reward_models import train
from reward_models.card import read_card
from reward_models.loading import load_reward_model
from reward_models.settings import RewardModelSettings, RewardScript, RewardTraining
from reward_models.trainer import RewardTrainer
from vgf_llm.errors import ConfigError, DataError, ModelError, OutputError


@pytest.fixture
def workplace(tmp_path, tiny_lm, tiny_tokenizer):
    """A base model and pairs; returns a function that trains on them."""
    tiny_lm.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    pairs = [{"prompt": noun, "chosen": "good " + noun, "rejected": "bad"} for noun in ("dog", "cat", "sea", "tea")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def run(lora_r=0, data="pairs.jsonl", output="out", **training):
        source = str(tmp_path / data)
        script = RewardScript(source, str(tmp_path / output), source, max_length=64, fidelity_responses=0)
        settings = RewardModelSettings(str(tmp_path / "base"), num_layers=1, lora_r=lora_r)
        return train.run(script, settings, RewardTraining(**({"max_steps": 2} | training)))

    return run


@pytest.mark.parametrize("ranks", [(4, 0), (0, 4)])
def test_a_second_training_of_another_kind_is_what_is_loaded(workplace, tmp_path, ranks):
    for rank in ranks:
        card = workplace(lora_r=rank)
    out = tmp_path / "out"
    assert card.adapter == read_card(out).adapter == bool(ranks[1])
    assert bool(list(out.glob("adapter_*"))) == bool(ranks[1]) != bool(list(out.glob("model*.safetensors")))
    load_reward_model(out)


def test_a_kill_before_the_card_leaves_no_old_card_beside_new_weights(workplace, tmp_path, monkeypatch, tiny_tokenizer):
    workplace()

    def kill(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "finish", kill)
    with pytest.raises(KeyboardInterrupt):
        workplace(lora_r=4)
    out = tmp_path / "out"
    assert not (out / "reward_card.json").exists()
    assert not any(path.read_text().startswith("# Reward model") for path in out.glob("README.md"))
    load_reward_model(out, tokenizer=tiny_tokenizer)


def test_a_kill_in_training_leaves_nothing_to_load(workplace, tmp_path, monkeypatch):
    workplace()

    def kill(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(RewardTrainer, "train", kill)
    with pytest.raises(KeyboardInterrupt):
        workplace()
    with pytest.raises(ModelError, match="has no config.json"):
        load_reward_model(tmp_path / "out")


def test_a_bad_input_takes_nothing_away(workplace, tmp_path):
    workplace(save_steps=1)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(DataError):
        workplace(data="missing.jsonl", resume=True)
    with pytest.raises(ConfigError, match="holds checkpoint-1, checkpoint-2 of another run.*set resume: true"):
        workplace()
    with pytest.raises(ConfigError, match="holds no LoRA, but lora_r is above 0"):
        workplace(lora_r=4, resume=True)
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        workplace(resume=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        workplace(resume=str(tmp_path / "base"), output="unmade")
    assert not (tmp_path / "unmade").exists()
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_checkpoints_of_an_earlier_run_are_refused_unless_resumed(workplace, tmp_path, tiny_tokenizer):
    workplace(save_steps=1)
    out = tmp_path / "out"
    workplace(save_steps=1, max_steps=3, resume=True)
    assert {path.name for path in out.glob("*checkpoint-*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    load_reward_model(out / "checkpoint-3", tokenizer=tiny_tokenizer)
    tiny_tokenizer.chat_template = None
    with pytest.raises(ModelError, match="the chat template differs"):
        load_reward_model(out / "checkpoint-3", tokenizer=tiny_tokenizer)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="holds checkpoint-1, checkpoint-2, checkpoint-3 of another run"):
        workplace(save_steps=1, max_steps=1)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="checkpoint-3' has 3 steps, and max_steps is 1: name an earlier checkpoint"):
        workplace(save_steps=1, max_steps=1, resume=True)


def test_a_second_training_replaces_a_result_with_folders(workplace, tmp_path, tiny_tokenizer):
    """A tokenizer with several chat templates saves them in a folder; a finished run is taken with it, too."""
    tiny_tokenizer.chat_template = {"default": tiny_tokenizer.chat_template or "x", "rag": "{{ messages[0].content }}"}
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    for _ in range(2):
        workplace()
    out = tmp_path / "out"
    names = sorted(path.name for path in out.iterdir())
    assert "additional_chat_templates" in names and not any(name.startswith(".") for name in names)
    load_reward_model(out)
    for _ in range(2):
        workplace(output="again", save_steps=2, resume=True)
    again = tmp_path / "again"
    assert sorted(path.name for path in again.iterdir() if not path.name.startswith("checkpoint")) == names
    assert (again / "additional_chat_templates" / "rag.jinja").is_file()


def test_resume_true_does_not_train_a_finished_result_anew(workplace, tmp_path):
    workplace()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="holds the result of a run and no whole checkpoint.*or write resume: false"):
        workplace(max_steps=3, resume=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    workplace(max_steps=3)


def test_a_folder_of_another_model_is_refused(workplace, tmp_path):
    with pytest.raises(OutputError, match="holds a model of type 'llama'; name another folder"):
        workplace(output="base")
    assert (tmp_path / "base" / "model.safetensors").is_file()
