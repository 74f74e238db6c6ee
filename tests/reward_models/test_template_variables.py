"""The policy's `chat_template_kwargs` reach a classifier that reads prompts under a chat template of its own."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from reward_models.directions.reward import read_reward
from reward_models.loading import load_reward_model
from reward_models.train_value import read_texts
from reward_models.value_settings import ValueScript
from tests.byte_tokenizers import CHATML, byte_tokenizer
from tests.reward_models.classifiers import LLAMA3, classifier, config_of, scores_by_transformers
from tests.reward_models.test_classification import scored, talks_of
from vgf_llm.answering.pipeline import load_pipeline
from vgf_llm.data.encoding import encode_prompt, set_in_template
from vgf_llm.models.loading import load_tokenizer
from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.training.rewards import load_rewards

TONED = "{% if tone is defined %}{{ tone }} {% endif %}"
OWN = TONED + CHATML + "{% if tone is defined and not add_generation_prompt %}{{ '!' }}{% endif %}"
BASES = {"the same template": OWN, "another template": TONED + LLAMA3}
STERN = {"tone": "stern"}


def test_prompt_and_closing_are_read_with_the_variables(tmp_path):
    folder, own = classifier(tmp_path, byte_tokenizer(template=OWN)), byte_tokenizer(template=OWN)
    talks = talks_of(own, 8)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    plain = torch.tensor(scores_by_transformers(model, own, talks))[:, 0]
    set_in_template(own, STERN)
    expected = torch.tensor(scores_by_transformers(model, own, talks))[:, 0]
    assert (plain - expected).abs().max() > 0.1
    for template in BASES.values():
        base = byte_tokenizer(template=template, bos="<s>")
        set_in_template(base, STERN)
        value, _, tokens, mask = scored(load_reward_model(folder, tokenizer=base), own, talks)
        ids = [encode_prompt(base, talk[:-1]) for talk in talks]
        assert (value.score(value.prefix(ids), tokens, mask)[:, 0] - expected).abs().max() < 1e-4


def test_what_its_template_does_not_have_is_left_out(tmp_path):
    folder = classifier(tmp_path, byte_tokenizer())
    base = byte_tokenizer(template=TONED + CHATML)
    set_in_template(base, STERN)
    value = load_reward_model(folder, tokenizer=base)
    assert value.own_tokenizer.chat_template == load_tokenizer(str(folder)).chat_template


@pytest.mark.parametrize("kind", ["generate, transport, evaluate, serve", "train", "direction"])
def test_every_command_hands_them_on(tmp_path, kind):
    """They load the reward model in these three ways, or as above (secant, import-reward)."""
    base = byte_tokenizer(template=BASES["another template"], bos="<s>")
    base.save_pretrained(tmp_path / "base")
    AutoModelForCausalLM.from_config(config_of("llama", base)).save_pretrained(tmp_path / "base")
    folder = str(classifier(tmp_path / "own", byte_tokenizer(template=OWN)))
    tokenizer = load_tokenizer(str(tmp_path / "base"), chat_template_kwargs=STERN)
    if kind == "train":
        value = load_rewards([folder], [], tokenizer).members[0].scorer
    elif kind == "direction":
        value = read_reward(folder, tokenizer).value
    else:
        models = ModelSettings(str(tmp_path / "base"), folder, dtype="float32", chat_template_kwargs=STERN)
        value = load_pipeline(models, SamplingSettings()).value
    written = value.own_tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert written == "stern <|im_start|>user\nHi<|im_end|>\n!"


def test_a_composed_reward_that_fills_in_rewards_has_them_too(tmp_path):
    folder = classifier(tmp_path / "own", byte_tokenizer(template=OWN))
    (tmp_path / "reward.yaml").write_text(f"reward: {folder}\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "rain", "response": "No"}\n')
    rows, reward = str(tmp_path / "rows.jsonl"), str(tmp_path / "reward.yaml")
    script = ValueScript(train_dataset=rows, reward_function=reward, output_dir=str(tmp_path / "out"))
    plain, stern = (read_texts(script, variables)[0][0].reward for variables in (None, STERN))
    assert plain != stern
