"""Base models from folders that people have: incomplete, of another kind, or an adapter with tables of its own."""

import json

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from reward_models.loading import add_lora, save_reward_model
from reward_models.modelling import RewardModel
from tests.conftest import build_llama
from vgf_llm.errors import ModelError
from vgf_llm.models.loading import load_causal_lm, load_skeleton

IDS = torch.tensor([[1, 20, 21, 22, 30], [1, 40, 41, 42, 43]])


def test_a_folder_without_an_output_layer_is_refused_by_its_weights_name(tiny_lm_untied, tmp_path):
    """The body alone, as AutoModel saves it: a random output layer would stand in at every load."""
    body = LlamaModel(tiny_lm_untied.config)
    body.load_state_dict(tiny_lm_untied.model.state_dict())
    body.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaModel"]
    with pytest.raises(ModelError, match=r"lacks the weights lm_head\.weight of a causal language model"):
        load_causal_lm(str(tmp_path))


def test_a_body_whose_tables_are_tied_lacks_nothing(tiny_lm, tmp_path):
    body = LlamaModel(tiny_lm.config)
    body.load_state_dict(tiny_lm.model.state_dict())
    body.save_pretrained(tmp_path)
    assert torch.equal(load_causal_lm(str(tmp_path))(IDS).logits, tiny_lm(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("load", [load_causal_lm, load_skeleton])
def test_a_sequence_classification_model_is_not_a_base(tiny_lm, tiny_lm_untied, tmp_path, tied, load):
    config = (tiny_lm if tied else tiny_lm_untied).config
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"reward model or classifier \(LlamaForSequenceClassification\)"):
        load(str(tmp_path))


@pytest.mark.parametrize("load", [load_causal_lm, load_skeleton])
def test_our_own_reward_model_is_not_a_base(tiny_lm, tmp_path, load):
    save_reward_model(RewardModel.from_base(tiny_lm), tmp_path)
    with pytest.raises(ModelError, match=r"reward model or classifier \(RewardModel\).*name the base model"):
        load(str(tmp_path))


@pytest.mark.parametrize("load", [load_causal_lm, load_skeleton])
def test_a_reward_adapter_is_not_a_base(tiny_lm, tmp_path, load):
    """Our own LoRA, and one of TRL with a task type; merged into the base they would be silently dropped."""
    tiny_lm.save_pretrained(tmp_path / "base")
    base = load_causal_lm(str(tmp_path / "base"))
    save_reward_model(add_lora(RewardModel.from_base(base), r=2, alpha=4.0), tmp_path / "ours")
    with pytest.raises(ModelError, match="adapter of a reward model or classifier"):
        load(str(tmp_path / "ours"))
    scorer = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    get_peft_model(scorer, LoraConfig(task_type="SEQ_CLS", r=2)).save_pretrained(tmp_path / "trl")
    with pytest.raises(ModelError, match=r"adapter of a reward model or classifier \(task_type 'SEQ_CLS'\)"):
        load(str(tmp_path / "trl"))
    plain = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    get_peft_model(plain, LoraConfig(r=2, modules_to_save=["score"])).save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match=r"adapter of a reward model or classifier \(a trained score\)"):
        load(str(tmp_path / "plain"))


LINEAR = ["q_proj", "v_proj"]
ADAPTERS = {
    "plain": (0, LoraConfig(r=2, target_modules=LINEAR)),
    "rslora and dora": (0, LoraConfig(r=2, target_modules=LINEAR, use_rslora=True, use_dora=True)),
    "whole tables": (0, LoraConfig(r=2, target_modules=LINEAR, modules_to_save=["embed_tokens", "lm_head"])),
    "input table only": (0, LoraConfig(r=2, target_modules=LINEAR, modules_to_save=["embed_tokens"])),
    "some tokens": (0, LoraConfig(r=2, target_modules=LINEAR, trainable_token_indices=[3, 5])),
    "lora on the table": (0, LoraConfig(r=2, target_modules=[*LINEAR, "embed_tokens"])),
    "more rows, whole tables": (4, LoraConfig(r=2, target_modules=LINEAR, modules_to_save=["embed_tokens", "lm_head"])),
    "more rows, saved by peft": (4, LoraConfig(r=2, target_modules=LINEAR)),
    "more rows, input table only": (4, LoraConfig(r=2, target_modules=LINEAR, modules_to_save=["embed_tokens"])),
    "more rows, some tokens": (4, LoraConfig(r=2, target_modules=LINEAR, trainable_token_indices=[61, 62])),
    "more rows, lora on both": (4, LoraConfig(r=2, target_modules=[*LINEAR, "embed_tokens", "lm_head"])),
    "fewer rows, whole tables": (
        -6,
        LoraConfig(r=2, target_modules=LINEAR, modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "fewer rows, saved by peft": (-6, LoraConfig(r=2, target_modules=LINEAR)),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_answers_as_it_did_where_it_was_trained(tiny_lm, tiny_lm_untied, tmp_path, name, tied):
    """Also with tokens added, or a padded table cut, before training; the loaded tables have the adapter's rows."""
    added, config = ADAPTERS[name]
    (tiny_lm if tied else tiny_lm_untied).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rows = base.config.vocab_size + added
    if added:
        base.resize_token_embeddings(rows, mean_resizing=False)
    adapted = get_peft_model(base, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.cat([IDS, torch.tensor([[rows - 1, rows - 2], [3, 5]])], 1)
    expected = adapted.eval()(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")

    loaded = load_causal_lm(str(tmp_path / "adapter"))
    assert loaded.get_input_embeddings().weight.shape[0] == loaded.config.vocab_size == rows
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-4, rtol=1e-4)
    loaded.save_pretrained(tmp_path / "merged")
    again = load_causal_lm(str(tmp_path / "merged"))
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("table", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_that_peft_did_not_save_are_asked_for(tiny_lm, tiny_lm_untied, tmp_path, table, tied):
    """A LoRA on one of two tables: PEFT saves the other one's new rows nowhere. Tied tables are one."""
    (tiny_lm if tied else tiny_lm_untied).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(64, mean_resizing=False)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=[*LINEAR, table])).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    if tied:
        loaded = load_causal_lm(str(tmp_path / "adapter"))
        torch.testing.assert_close(loaded(IDS).logits, adapted(IDS).logits, atol=1e-4, rtol=1e-4)
        return
    other = {"embed_tokens": "lm_head", "lm_head": "model.embed_tokens"}[table]
    with pytest.raises(ModelError, match=rf"trained with 64 rows, its base model has 60, and the new rows of {other}"):
        load_causal_lm(str(tmp_path / "adapter"))


def test_an_adapter_of_another_base_is_refused(tiny_lm, tiny_neox, tmp_path):
    tiny_lm.save_pretrained(tmp_path / "base")
    tiny_neox.save_pretrained(tmp_path / "other")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=LINEAR)).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(ModelError, match="does not fit its base model"):
        load_causal_lm(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("layers", "width", "message"),
    [
        (3, 32, "lacks weights for parts of its base model, '.*layers.2.self_attn.q_proj.lora_A.weight' first"),
        (1, 32, "has weights that its base model has no place for, '.*layers.1.self_attn.q_proj.lora_A.weight' first"),
        (2, 64, "does not fit its base model: Error.* size mismatch for "),
    ],
)
def test_an_adapter_of_a_base_of_another_size_is_refused(tiny_lm, tmp_path, layers, width, message):
    tiny_lm.save_pretrained(tmp_path / "base")
    build_llama(layers=layers, width=width).save_pretrained(tmp_path / "other")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=LINEAR)).save_pretrained(tmp_path / "adapter")
    renamed(tmp_path / "adapter", tmp_path / "other")
    with pytest.raises(ModelError, match=message):
        load_causal_lm(str(tmp_path / "adapter"))


def test_an_adapter_that_cannot_be_merged_says_why(tiny_lm, tmp_path):
    tiny_lm.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=LINEAR)).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="has adapter_config.json and no adapter_model.safetensors; save the adapter"):
        load_causal_lm(str(tmp_path / "adapter"))
    renamed(tmp_path / "adapter", tmp_path / "adapter")
    with pytest.raises(ModelError, match="names its own folder as the base model"):
        load_causal_lm(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match="of the kind PROMPT_TUNING, which puts vectors before a prompt and cannot be"):
        load_causal_lm(str(tmp_path / "prompt"))


def renamed(folder, base):
    """Write another base's name into an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
