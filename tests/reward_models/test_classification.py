"""Classifiers of others as reward models: the same scores as transformers gives to the rendered conversation."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from reward_models.called import classifier_reward
from reward_models.classification import load_classifier, read_classifier, reward_head
from reward_models.loading import load_reward_model
from reward_models.outputs import output_weights
from tests.byte_tokenizers import byte_tokenizer
from tests.reward_models.classifiers import (
    TOKENIZERS,
    classifier,
    config_of,
    scores_by_transformers,
    train_with_trl,
)
from vgf_llm.data.encoding import encode_prompt, encode_response
from vgf_llm.data.endings import eos_ids_of
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.models.loading import load_tokenizer

WORDS = "rain desk lamp bright sentence write about one 1 2 3 on the is Please".split()


def talks_of(tokenizer, count=20):
    """Conversations of uneven length, with system turns and several turns where the template has a place for them."""
    generator = torch.Generator().manual_seed(1)

    def text(most):
        size = int(torch.randint(1, most, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (size,), generator=generator).tolist())

    talks = []
    for index in range(count):
        turns = [{"role": "user", "content": text(12)}, {"role": "assistant", "content": text(30)}]
        if tokenizer.chat_template and index % 3 == 0:
            turns = [{"role": "user", "content": text(9)}, {"role": "assistant", "content": text(9)}, *turns]
        if tokenizer.chat_template and "[INST]" not in tokenizer.chat_template and index % 4 == 1:
            turns = [{"role": "system", "content": text(5)}, *turns]
        talks.append(turns)
    return talks


def scored(value, tokenizer, talks, is_ended=True):
    """Score by our path: prompts run once, responses as ids, all in one padded batch."""
    prompts = [talk[:-1] if tokenizer.chat_template else talk[0]["content"] for talk in talks]
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers = [encode_response(tokenizer, talk[-1]["content"], eos=is_ended) for talk in talks]
    longest = max(map(len, answers))
    tokens = torch.tensor([[answer + [0] * (longest - len(answer))] for answer in answers])
    mask = torch.tensor([[[True] * len(answer) + [False] * (longest - len(answer))] for answer in answers])
    return value, ids, tokens, mask


@pytest.mark.parametrize("style", sorted(TOKENIZERS))
@pytest.mark.parametrize("is_ended", [True, False], ids=["ended", "cut"])
def test_scores_are_those_of_transformers_under_every_style_of_template(tmp_path, style, is_ended):
    tokenizer = byte_tokenizer(**TOKENIZERS[style])
    folder = classifier(tmp_path / "classifier", tokenizer)
    talks = talks_of(tokenizer)
    value, ids, tokens, mask = scored(load_reward_model(folder, tokenizer=tokenizer), tokenizer, talks, is_ended)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = torch.tensor(scores_by_transformers(model, tokenizer, talks))[:, 0]
    found = value.score(value.prefix(ids), tokens, mask)[:, 0]
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4
    by_embedding = value.score(value.prefix(ids), value.embed(tokens), mask)[:, 0]
    assert torch.equal(by_embedding, found)


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma", "neox"])
def test_families(tmp_path, family):
    tokenizer = byte_tokenizer()
    folder = classifier(tmp_path, tokenizer, family)
    tokenizer = load_tokenizer(str(folder))  # Qwen's has rules of its own, whatever was saved
    talks = talks_of(tokenizer, 8)
    value, ids, tokens, mask = scored(load_reward_model(folder, tokenizer=tokenizer), tokenizer, talks)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    expected = torch.tensor(scores_by_transformers(model, tokenizer, talks))[:, 0]
    assert (value.score(value.prefix(ids), tokens, mask)[:, 0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["full", "lora", "lora_saves_score"])
def test_what_trl_trains_is_loaded(tmp_path, kind):
    tokenizer = byte_tokenizer()
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config_of("llama", tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lora = None
    if kind != "full":
        saved = {"modules_to_save": ["score"]} if kind == "lora_saves_score" else {}
        lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], **saved)
    folder = train_with_trl(base, tmp_path / "trained", tokenizer, lora)
    talks = talks_of(tokenizer, 8)
    value, ids, tokens, mask = scored(load_reward_model(folder, tokenizer=tokenizer), tokenizer, talks)
    if kind == "full":
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    else:
        from peft import AutoPeftModelForSequenceClassification

        model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    expected = torch.tensor(scores_by_transformers(model, tokenizer, talks))[:, 0]
    assert (value.score(value.prefix(ids), tokens, mask)[:, 0] - expected).abs().max() < 1e-4


def test_several_outputs_are_weighed_by_name_or_number(tmp_path):
    tokenizer = byte_tokenizer()
    names = {0: "helpfulness", 1: "correctness", 2: "verbosity"}
    folder = classifier(tmp_path, tokenizer, num_labels=3, id2label=names)
    with pytest.raises(ConfigError, match=r"has 3 outputs \(helpfulness, correctness, verbosity\); give their weights"):
        load_reward_model(folder)
    with pytest.raises(ConfigError, match="has no output 'length'"):
        load_reward_model(folder, outputs={"length": 1.0})
    talks = talks_of(tokenizer, 6)
    value = load_reward_model(folder, outputs={"helpfulness": 1.0, "2": -0.5})
    value, ids, tokens, mask = scored(value, tokenizer, talks)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = torch.tensor(scores_by_transformers(model, tokenizer, talks)) @ torch.tensor([1.0, 0.0, -0.5])
    assert (value.score(value.prefix(ids), tokens, mask)[:, 0] - expected).abs().max() < 1e-4


def test_heads_with_a_bias_and_small_stacks():
    """By hand: head(h) = sum_k a_k (W_k h + b_k), after the stack's first layers where there are some."""
    linear = torch.nn.Linear(3, 2)
    weights_K, h_D = torch.tensor([2.0, -1.0]), torch.tensor([0.3, -0.7, 1.1])
    assert torch.allclose(reward_head(linear, weights_K)(h_D), (linear(h_D) * weights_K).sum())
    stack = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), linear.__class__(4, 2))
    assert torch.allclose(reward_head(stack, weights_K)(h_D), (stack(h_D) * weights_K).sum())
    with pytest.raises(ModelError, match="not a stack ending in a Linear"):
        reward_head(torch.nn.Identity(), weights_K)


def test_weights_of_outputs_by_name_or_number():
    assert output_weights(["a"], None, "m").tolist() == [1.0]
    assert output_weights(["a", "b"], {1: 2, "a": -0.5}, "m").tolist() == [-0.5, 2.0]
    assert output_weights(["a", "0"], {0: 1.0}, "m").tolist() == [0.0, 1.0]  # a name goes before a number
    for wanted, said in (
        ({"a": 1.0, 0: 1.0}, "the output 'a' of m is named twice"),
        ({"a": math.nan}, "the weight of 'a' must be a finite number, got nan"),
        ({"a": "1"}, "the weight of 'a' must be a finite number, got '1'"),
        ({"a": 0.0}, "are all 0; raise one of a, b"),
        ({2: 1.0}, "m has no output '2'; it has a, b"),
        ({"²": 1.0}, "m has no output '²'"),
    ):
        with pytest.raises(ConfigError, match=said):
            output_weights(["a", "b"], wanted, "m")


def test_gradients_are_those_of_finite_differences_and_the_closing_holds_still(tmp_path):
    tokenizer = byte_tokenizer()
    value = load_reward_model(classifier(tmp_path, tokenizer), tokenizer=tokenizer).double()
    _, ids, tokens, mask = scored(value, tokenizer, talks_of(tokenizer, 3))
    u = value.embed(tokens).detach().requires_grad_(True)
    prefix = value.prefix(ids)
    (gradient,) = torch.autograd.grad(value.score(prefix, u, mask).sum(), u)
    ended = torch.tensor([eos_ids_of(tokenizer)[0]])
    assert torch.isin(tokens[mask], ended).any()
    last = (mask.sum(-1, keepdim=True) - 1)[..., None].expand(-1, -1, 1, u.shape[-1])
    assert gradient.gather(2, last).abs().max() == 0  # the EOS, in whose place the closing stands
    direction = torch.zeros_like(u)
    direction[:, :, 0] = torch.randn_like(u[:, :, 0])
    step = 1e-3
    with torch.no_grad():
        change = value.score(prefix, u + step * direction, mask) - value.score(prefix, u - step * direction, mask)
    assert torch.allclose(change.sum().double() / (2 * step), (gradient * direction).sum(), rtol=1e-2)


def test_what_cannot_be_a_reward_model_is_told(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = byte_tokenizer()
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=1, **shape)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="an encoder, which has no value in the policy's token space"):
        load_classifier(tmp_path)
    with pytest.raises(ModelError, match="is not a sequence- or token-classification model"):
        read_classifier(tmp_path / "nothing")


def test_prompts_are_read_under_the_classifiers_own_template(tmp_path):
    """The base has Llama 3's template, the classifier ChatML; both have the same ids."""
    own, base = byte_tokenizer(), byte_tokenizer(**TOKENIZERS["llama3"])
    folder = classifier(tmp_path, own)
    talks = talks_of(own, 6)
    value = load_reward_model(folder, tokenizer=base)
    _, _, tokens, mask = scored(value, own, talks)
    ids = [encode_prompt(base, talk[:-1]) for talk in talks]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = torch.tensor(scores_by_transformers(model, own, talks))[:, 0]
    assert (value.score(value.prefix(ids), tokens, mask)[:, 0] - expected).abs().max() < 1e-4
    with pytest.raises(ModelError, match="own chat template"):
        value.prefix([[5, 6, 7]])


def test_another_tokenizer_is_refused_where_gradients_are_asked_for(tmp_path, tiny_tokenizer):
    folder = classifier(tmp_path, byte_tokenizer())
    with pytest.raises(ModelError, match="gives other ids than the base model's"):
        load_reward_model(folder, tokenizer=tiny_tokenizer)


@pytest.mark.parametrize(
    ("family", "style"), [("qwen", "chatml"), ("llama", "llama3_pad_is_eos"), ("llama", "phi_pad_is_eos")]
)
def test_a_token_classifier_is_read_at_the_last_token(tmp_path, family, style):
    """As process reward models are made: two outputs per token, here their difference; padding may equal the EOS."""
    tokenizer = byte_tokenizer(**TOKENIZERS[style])
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(config_of(family, tokenizer, num_labels=2)).eval()
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokenizer, outputs = load_tokenizer(str(tmp_path)), {"1": 1.0, "0": -1.0}
    talks = talks_of(tokenizer, 6)
    value = load_reward_model(tmp_path, tokenizer=tokenizer, outputs=outputs)
    value, ids, tokens, mask = scored(value, tokenizer, talks)
    last = torch.tensor([rows[-1] for rows in scores_by_transformers(model, tokenizer, talks)])
    found = value.score(value.prefix(ids), tokens, mask)[:, 0]
    assert (found - (last[:, 1] - last[:, 0])).abs().max() < 1e-4
    called = classifier_reward(tmp_path, outputs)
    short = [talk[-2:] for talk in talks]
    by_text = called([talk[0]["content"] for talk in short], [talk[1]["content"] for talk in short])
    last = torch.tensor([rows[-1] for rows in scores_by_transformers(model, tokenizer, short)])
    assert (torch.tensor(by_text) - (last[:, 1] - last[:, 0])).abs().max() < 1e-4
