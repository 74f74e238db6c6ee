"""Heads that transformers would drop or make up are read from the file; names on the hub go through its cache."""

from __future__ import annotations

import json
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from reward_models import check, import_reward, train_secant
from reward_models.card import read_card
from reward_models.classification import load_classifier, read_classifier
from reward_models.inputs import check_reward_model, check_rewards
from reward_models.loading import load_reward_model
from reward_models.sources import is_hub_name, local_folder, shown_name
from reward_models.value_model import build_value_model
from tests.byte_tokenizers import byte_tokenizer
from tests.reward_models.checked import changed
from tests.reward_models.classifiers import TOKENIZERS, classifier, config_of, scores_by_transformers
from tests.reward_models.test_classification import scored, talks_of
from vgf_llm.data.encoding import encode_prompt
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.text.responses import Responses
from vgf_llm.training.rewards import load_rewards


def with_weights(folder, **weights):
    """Put weights into a folder's file, or take them out."""
    path = folder / "model.safetensors"
    found = load_file(path) | {name.replace("__", "."): tensor for name, tensor in weights.items()}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path, {"format": "pt"})
    return folder


def read_here(folder, tokenizer, talks):
    value, ids, tokens, mask = scored(load_reward_model(folder, tokenizer=tokenizer), tokenizer, talks)
    return value.score(value.prefix(ids), tokens, mask)[:, 0]


def test_a_bias_in_the_file_is_added(tmp_path):
    tokenizer = byte_tokenizer()
    folder, talks = classifier(tmp_path, tokenizer), talks_of(tokenizer, 6)
    before = read_here(folder, tokenizer, talks)
    after = read_here(with_weights(folder, score__bias=torch.tensor([2.5])), tokenizer, talks)
    assert torch.allclose(after, before + 2.5, atol=1e-5)


def test_a_stack_is_read_where_its_activation_is_known(tmp_path):
    tokenizer = byte_tokenizer()
    folder, talks = classifier(tmp_path, tokenizer), talks_of(tokenizer, 6)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    first, last = torch.nn.Linear(32, 16), torch.nn.Linear(16, 1)
    plain.score = torch.nn.Sequential(first, torch.nn.ReLU(), last)
    expected = torch.tensor(scores_by_transformers(plain, tokenizer, talks))[:, 0]
    parts = {"score__0__weight": first.weight, "score__0__bias": first.bias, "score__2__bias": last.bias}
    parts = {name: tensor.detach() for name, tensor in parts.items()}
    with_weights(folder, score__weight=None, score__2__weight=last.weight.detach(), **parts)
    with pytest.raises(ModelError, match='add "head_activation" to its config.json'):
        load_classifier(folder)
    changed(folder, head_activation="relu")
    assert (read_here(folder, tokenizer, talks) - expected).abs().max() < 1e-4
    changed(folder, head_activation=None, architectures=["Qwen2ForRewardModel"])
    assert (read_here(folder, tokenizer, talks) - expected).abs().max() < 1e-4


def test_heads_that_have_no_place_are_refused_by_name(tmp_path):
    folder = with_weights(classifier(tmp_path, byte_tokenizer()), gating__weight=torch.ones(2, 2))
    with pytest.raises(ModelError, match=r"holds gating.weight, which LlamaForSequenceClassification has no place for"):
        read_classifier(folder)


def test_an_adapter_that_saves_a_bias(tmp_path):
    tokenizer = byte_tokenizer()
    base, talks = classifier(tmp_path / "base", tokenizer), talks_of(tokenizer, 4)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    before = read_here(tmp_path / "adapter", tokenizer, talks)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.score.bias": torch.tensor([1.5])}, path, {"format": "pt"})
    assert torch.allclose(read_here(tmp_path / "adapter", tokenizer, talks), before + 1.5, atol=1e-5)


def test_a_base_that_ends_in_another_token_than_the_classifier(tmp_path):
    """The base ends in </s>, the classifier in <|im_end|>: the base's EOS is read as the classifier's closing."""
    own, base = byte_tokenizer(), byte_tokenizer(**TOKENIZERS["zephyr"])
    folder, talks = classifier(tmp_path, own), [talk[-2:] for talk in talks_of(own, 6)]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = torch.tensor(scores_by_transformers(model, own, talks))[:, 0]
    value, _, tokens, mask = scored(load_reward_model(folder, tokenizer=base), base, talks)
    ids = [encode_prompt(base, talk[:-1]) for talk in talks]
    assert int(tokens[0, 0, mask[0, 0].sum() - 1]) == base.eos_token_id != own.eos_token_id
    assert (value.score(value.prefix(ids), tokens, mask)[:, 0] - expected).abs().max() < 1e-4


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert is_hub_name("org/name-1.5") and is_hub_name("0x/y")
    for name in ("outputs/reward", "a/b/c", "./a", "/a/b", "module:function", "reward_models/x", "name", "~/x"):
        assert not is_hub_name(name), name
    check_reward_model("org/name")
    check_rewards(["org/name"])
    with pytest.raises(ConfigError, match="is not a folder"):
        check_rewards(["outputs/none"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(ModelError, match="not in the cache of the hub, and cannot be downloaded"):
        local_folder("some-org/no-such-reward-model")
    assert time.monotonic() - start < 30


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A classifier as the hub's client lays it out: refs/main names the snapshot. The hub is out of reach."""
    repository = tmp_path / "models--org--judge-1.5"
    folder = classifier(repository / "snapshots" / "abc", byte_tokenizer())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True)
    return folder


def test_a_name_in_the_cache_of_the_hub_is_found_offline(snapshot):
    folder = local_folder("org/judge-1.5")
    assert json.loads((snapshot / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    assert load_reward_model(folder, tokenizer=byte_tokenizer()).head.weight.shape == (1, 32)


def test_a_model_of_the_hub_keeps_its_name(snapshot, tmp_path, capsys):
    """In metrics and messages of training, on cards, and in checks; other folders keep theirs."""
    assert shown_name(snapshot) == "org/judge-1.5"
    assert shown_name("outputs/snapshots/reward") == "outputs/snapshots/reward"
    tokenizer = byte_tokenizer()
    rewards = load_rewards(["org/judge-1.5", "length_words"], [], tokenizer)
    assert [member.name for member in rewards.members] == ["org/judge-1.5", "length_words"]
    found = rewards(["a"], Responses([[1, 9]], torch.tensor([[[9, 2]]]), torch.ones(1, 1, 2).bool(), (2,), 0))
    assert set(found) == {"reward", "reward_org/judge-1.5", "reward_length_words"}
    assert load_reward_model(snapshot, tokenizer=tokenizer).config.base_name == "org/judge-1.5"
    check.main(["org/judge-1.5", "--limit", "8", "--device", "cpu"])
    shown = capsys.readouterr().err
    assert "Check of org/judge-1.5" in shown and "abc" not in shown
    card = ["--output_dir", str(tmp_path / "imported"), "--limit", "8", "--fidelity_responses", "0", "--device", "cpu"]
    import_reward.main(["--reward_model", "org/judge-1.5", *card])
    assert read_card(tmp_path / "imported").imported_from == "org/judge-1.5"


def test_a_value_that_starts_from_a_classifier_is_read_alike_in_training_and_use(tmp_path, capsys):
    """Training reads every token of prompt and response; use has to read the last one, without a closing."""
    tokenizer = byte_tokenizer()
    base = AutoModelForCausalLM.from_config(config_of("llama", tokenizer)).eval()
    folder = classifier(tmp_path, tokenizer)
    value = build_value_model(base, start_from=folder, tokenizer=tokenizer)
    assert "read at every token" in capsys.readouterr().err
    assert not value.body.get_input_embeddings().weight.requires_grad and value.head.weight.requires_grad
    prompt, response = [7, 8, 9], [11, 12, 13]
    values_RS = value(
        input_ids=torch.tensor([prompt + response]),
        response_mask=torch.tensor([[0, 0, 0, 1, 1, 1]]),
        token_level=True,
    )
    score_BN = value.score(value.prefix([prompt]), torch.tensor([[response]]), torch.ones(1, 1, 3, dtype=torch.bool))
    assert torch.allclose(values_RS[0, -1], score_BN[0, 0], atol=1e-5)


def test_a_secant_head_is_not_fitted_beside_a_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ["--prompts", "a.jsonl", "--validation_prompts", "b.jsonl"]
    with pytest.raises(ConfigError, match="run `vgf-llm import-reward` first"):
        train_secant.main(["--reward_model", "org/name", *files])
    assert not (tmp_path / "org").exists()
