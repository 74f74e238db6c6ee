"""Classifiers called as functions of texts: the scores of transformers, in batches of uneven length."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

from reward_models import train_secant
from reward_models.called import classifier_reward
from reward_models.foreign import foreign_reward, text_reward
from tests.byte_tokenizers import byte_tokenizer
from tests.reward_models.classifiers import TOKENIZERS, classifier, scores_by_transformers
from tests.reward_models.test_classification import talks_of
from vgf_llm import evaluate, generate, train, transport
from vgf_llm.data.encoding import set_in_template
from vgf_llm.errors import ConfigError, DataError

_SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
ENCODERS = {
    "bert": lambda **changes: BertForSequenceClassification(BertConfig(**_SHAPE, **changes)),
    "deberta": lambda **changes: DebertaV2ForSequenceClassification(DebertaV2Config(**_SHAPE, **changes)),
}


def encoder(folder, tokenizer, kind="deberta"):
    torch.manual_seed(0)
    model = ENCODERS[kind](vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model.classifier.weight.data.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", sorted(ENCODERS))
def test_an_encoder_reads_prompt_and_response_as_a_pair(tmp_path, kind):
    tokenizer = byte_tokenizer(template=None)
    folder = encoder(tmp_path, tokenizer, kind)
    reward = classifier_reward(folder)
    prompts, responses = ["Please write.", "rain", "on the desk"], ["The lamp is bright.", "1 2 3 on the desk", "No"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = []
    for pair in zip(prompts, responses, strict=True):
        with torch.no_grad():
            expected.append(model(**reward.tokenizer(*pair, return_tensors="pt")).logits.item())
    assert torch.allclose(torch.tensor(reward(prompts, responses)), torch.tensor(expected), atol=1e-5)
    assert foreign_reward(folder, tokenizer, "cpu", torch.float32) is not None  # whatever the policy's tokenizer


@pytest.mark.parametrize("style", ["chatml", "llama3_pad_is_eos", "mistral", "none"])
def test_a_decoder_is_called_in_batches(tmp_path, style):
    tokenizer = byte_tokenizer(**TOKENIZERS[style])
    folder = classifier(tmp_path, tokenizer)
    talks = [talk[-2:] for talk in talks_of(tokenizer, 40)]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = torch.tensor(scores_by_transformers(model, tokenizer, talks))[:, 0]
    found = classifier_reward(folder)([talk[0]["content"] for talk in talks], [talk[1]["content"] for talk in talks])
    assert (torch.tensor(found) - expected).abs().max() < 1e-4


def test_variables_of_the_policys_template_reach_the_classifiers_own(tmp_path, tiny_tokenizer):
    """Those that its template reads; others are not its."""
    tokenizer = byte_tokenizer(**TOKENIZERS["chatml"])
    tokenizer.chat_template = "{% if tone is defined %}{{ tone }} {% endif %}" + tokenizer.chat_template
    folder = str(classifier(tmp_path, tokenizer))
    plain, stern = (text_reward(folder, variables=v) for v in (None, {"tone": "stern", "enable_thinking": False}))
    assert stern(["rain"], ["No"]) != plain(["rain"], ["No"])
    written = tokenizer.apply_chat_template([{"role": "user", "content": "rain"}], tokenize=False, tone="stern")
    assert stern.tokenizer.apply_chat_template([{"role": "user", "content": "rain"}], tokenize=False) == written
    policy = copy.deepcopy(tiny_tokenizer)
    policy.chat_template = "{{ tone }}" + policy.chat_template
    set_in_template(policy, {"tone": "stern"})
    foreign = foreign_reward(folder, policy, "cpu", torch.float32)
    assert foreign(["rain"], ["No"]) == stern(["rain"], ["No"])


def test_a_conversation_that_is_too_long_is_named(tmp_path):
    folder = encoder(tmp_path, byte_tokenizer(template=None), "bert")
    with pytest.raises(DataError, match="has .* tokens in its own tokenizer, and the model 512 positions"):
        classifier_reward(folder)(["rain " * 600], ["No"])


def test_a_name_is_a_function_or_a_folder(tmp_path):
    folder = encoder(tmp_path, byte_tokenizer(template=None))
    assert text_reward("length_words")(["a"], ["b c"]) == [2.0]
    assert len(text_reward(str(folder))(["a"], ["b c"])) == 1
    several = classifier(tmp_path / "two", byte_tokenizer(), num_labels=2, id2label={0: "a", 1: "b"})
    with pytest.raises(ConfigError, match=r"has 2 outputs \(a, b\), and a gold .* `vgf-llm import-reward --reward_out"):
        text_reward(str(several))


def test_commands_take_classifiers_by_one_line(tmp_path, tiny_lm, tiny_tokenizer, capsys):
    """A decoder's gradient moves particles; an encoder of another tokenizer scores, and a learned value moves."""
    base = tmp_path / "base"
    tiny_lm.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    judge = copy.deepcopy(tiny_tokenizer)
    judge.chat_template = tiny_tokenizer.chat_template.replace("<user>", "<user> this is")  # a template of its own
    own = classifier(tmp_path / "own", judge, num_labels=2, id2label={0: "good", 1: "long"})
    foreign = encoder(tmp_path / "foreign", byte_tokenizer(template=None))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("the sea", "a dog", "rain")))
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text('{"prompt": "a cat"}\n')
    model = ["--model_name_or_path", str(base), "--max_new_tokens", "6"]
    outputs = ["--reward_outputs", "{good: 1.0}"]
    assert generate.main([*model, "--reward_model", str(own), *outputs, "--prompt", "the sea"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["value"] >= row["original_value"]
    flags = ["--prompts", str(prompts), "--output_dir", str(tmp_path / "evaluation"), "--best_of", "[2]"]
    budgets = ["--budgets", "[{nats: 1}]", "--num_particles", "2", "--gold", str(foreign)]
    assert evaluate.main([*model, "--reward_model", str(own), *outputs, *flags, *budgets]) == 0
    output = ["--output_dir", str(tmp_path / "transport"), "--prompts", str(prompts), "--num_particles", "2"]
    assert transport.main([*model, "--reward_model", str(own), *outputs, *output]) == 0
    secant = ["--steps", "3", "--hidden", "4", "--substitutions", "2", "--shortlist", "4", "--base", "none"]
    files = ["--prompts", str(prompts), "--validation_prompts", str(unseen)]
    assert train_secant.main([*model, "--reward_model", str(own), *outputs, *secant, *files]) == 0
    common = ["--prompts", str(prompts), "--max_steps", "1", "--lora_r", "2", "--num_particles", "2"]
    for kind, rewards in (("own", [str(own), *outputs]), ("learned", [str(foreign), "--value", "learned"])):
        output = ["--output_dir", str(tmp_path / kind), "--gold", "length_words"]
        assert train.main([*model, "--rewards", *rewards, *common, *output]) == 0
