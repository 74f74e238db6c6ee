"""Imported classifiers work by their folder in every command; exported models score in transformers as they do here."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from reward_models import export_reward, import_reward
from reward_models.called import classifier_reward
from reward_models.card import read_card
from reward_models.loading import load_reward_model, save_reward_model
from reward_models.modelling import RewardModel
from reward_models.secant import stated_fidelity
from tests.byte_tokenizers import CHATML, byte_tokenizer
from tests.reward_models.checked import pairs_of, write_pairs
from tests.reward_models.classifiers import LLAMA3, TOKENIZERS, classifier, config_of, scores_by_transformers
from tests.reward_models.test_classification import scored, talks_of
from vgf_llm import generate
from vgf_llm.answering.pipeline import load_gradient
from vgf_llm.data.contents import scorer_contents
from vgf_llm.errors import ConfigError, ModelError, OutputError
from vgf_llm.models.loading import load_tokenizer


@pytest.fixture
def base(tmp_path):
    tokenizer = byte_tokenizer()
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config_of("llama", tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def imported(base, source, tmp_path, *more):
    data = write_pairs(tmp_path / "pairs.jsonl", pairs_of(12))
    argv = ["--reward_model", str(source), "--output_dir", str(tmp_path / "imported"), "--dataset", str(data)]
    argv += ["--model_name_or_path", str(base), "--device", "cpu", "--fidelity_responses", "4"]
    assert import_reward.main([*argv, *more]) == 0
    return tmp_path / "imported"


def test_an_imported_classifier_has_a_card_and_no_weights(base, tmp_path, capsys):
    tokenizer = byte_tokenizer()
    source = classifier(tmp_path / "source", tokenizer, num_labels=2, id2label={0: "good", 1: "long"})
    folder = imported(base, source, tmp_path, "--reward_outputs", "{good: 1.0, long: -0.5}")
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not list(folder.glob("*.safetensors"))
    card = read_card(folder)
    assert card.imported_from == str(source) and card.held_out_pairs == 12
    assert card.accuracy == figures["accuracy"] and card.score_std > 0 and card.calibration["confidence"] >= 0.5
    assert stated_fidelity(folder)["gradient"]["n"] == 4
    talks = talks_of(tokenizer, 6)
    value, ids, tokens, mask = scored(load_reward_model(folder, tokenizer=tokenizer), tokenizer, talks)
    direct = load_reward_model(source, tokenizer=tokenizer, outputs={"good": 1.0, "long": -0.5})
    assert torch.equal(value.score(value.prefix(ids), tokens, mask), direct.score(direct.prefix(ids), tokens, mask))
    short = [talk[-2:] for talk in talks]
    texts = [talk[0]["content"] for talk in short], [talk[1]["content"] for talk in short]
    assert classifier_reward(folder)(*texts) == classifier_reward(source, {"good": 1.0, "long": -0.5})(*texts)
    argv = [
        "--model_name_or_path",
        str(base),
        "--reward_model",
        str(folder),
        "--prompt",
        "Rain",
        "--max_new_tokens",
        "4",
    ]
    assert generate.main(argv) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["value"] is not None


def test_an_import_is_imported_again_with_other_outputs(base, tmp_path):
    source = classifier(tmp_path / "source", byte_tokenizer(), num_labels=2, id2label={0: "good", 1: "long"})
    first = imported(base, source, tmp_path, "--reward_outputs", "{good: 1.0}")
    imported(base, first, tmp_path, "--output_dir", str(tmp_path / "kept"))
    imported(base, first, tmp_path, "--output_dir", str(tmp_path / "other"), "--reward_outputs", "{long: -2.0}")
    pointers = [json.loads((tmp_path / name / "imported.json").read_text()) for name in ("imported", "kept", "other")]
    assert [one["source"] for one in pointers] == [str(source.resolve())] * 3
    assert [one["outputs"] for one in pointers] == [{"good": 1.0}, {"good": 1.0}, {"long": -2.0}]
    asked = ["Rain"], ["It falls."]
    assert classifier_reward(tmp_path / "kept")(*asked) == classifier_reward(source, {"good": 1.0})(*asked)
    assert classifier_reward(tmp_path / "other")(*asked) == classifier_reward(source, {"long": -2.0})(*asked)
    contents = [scorer_contents(str(tmp_path / name)) for name in ("imported", "kept", "other")]
    assert contents[0] == contents[1] != contents[2]


def test_a_source_that_changes_or_goes_is_told(base, tmp_path):
    source = classifier(tmp_path / "source", byte_tokenizer())
    folder = imported(base, source, tmp_path)
    weights = load_file(source / "model.safetensors")
    save_file(weights | {"score.weight": weights["score.weight"] + 1}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="which has changed since"):
        load_reward_model(folder)
    shutil.rmtree(source)
    with pytest.raises(ModelError, match="which is gone"):
        load_reward_model(folder)


def test_a_secant_head_is_fitted_to_an_import(base, tmp_path):
    source = classifier(tmp_path / "source", byte_tokenizer())
    fit, unseen = tmp_path / "fit.jsonl", tmp_path / "unseen.jsonl"
    fit.write_text('{"prompt": "Rain"}\n{"prompt": "The desk"}\n')
    unseen.write_text('{"prompt": "A lamp"}\n')
    files = ["--prompts", str(fit), "--validation_prompts", str(unseen), "--max_new_tokens", "4"]
    folder = imported(base, source, tmp_path, "--secant", "true", *files)
    value = load_reward_model(folder)
    assert load_gradient(folder, value).passes > 2 and "secant head" in stated_fidelity(folder)
    with pytest.raises(ConfigError, match="secant needs prompts"):
        imported(base, source, tmp_path, "--secant", "true")


def test_what_cannot_be_imported(base, tmp_path):
    source = classifier(tmp_path / "source", byte_tokenizer())
    with pytest.raises(OutputError, match="own folder"):
        imported(base, source, tmp_path, "--output_dir", str(source))
    with pytest.raises(OutputError, match="holds a model"):
        imported(base, source, tmp_path, "--output_dir", str(base))
    with pytest.raises(ModelError, match="is not a classifier"):
        imported(base, ours(tmp_path, byte_tokenizer()), tmp_path)


def ours(tmp_path, tokenizer, family="llama", **options):
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_config(config_of(family, tokenizer)).eval()
    value = RewardModel.from_base(base, num_layers=1, **options)
    torch.nn.init.normal_(value.head.weight)
    torch.nn.init.constant_(value.head.bias, 0.7)
    save_reward_model(value, tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


def exported(folder, tmp_path, *more):
    assert export_reward.main(["--reward_model", str(folder), "--output_dir", str(tmp_path / "out"), *more]) == 0
    return tmp_path / "out"


OPEN = CHATML.replace("'<|im_end|>\\n'", "'\\n'").replace("'<|im_end|>\n'", "'\n'")


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma", "mistral", "zephyr", "none", "open"])
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_an_exported_model_scores_in_transformers_as_here(tmp_path, capsys, style, family):
    options = {"template": OPEN} if style == "open" else TOKENIZERS[style]
    tokenizer = byte_tokenizer(**(options | ({"pad": "<pad>"} if style == "zephyr" else {})))
    folder = ours(tmp_path, tokenizer, family)
    out = exported(folder, tmp_path)
    offset = json.loads(capsys.readouterr().out.splitlines()[-1])["score_offset"]
    tokenizer = load_tokenizer(str(folder))
    talks = talks_of(tokenizer, 8)
    value, ids, tokens, mask = scored(load_reward_model(folder, tokenizer=tokenizer), tokenizer, talks)
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    expected = torch.tensor(scores_by_transformers(model, AutoTokenizer.from_pretrained(out), talks))[:, 0] + offset
    found = value.score(value.prefix(ids), tokens, mask)[:, 0]
    assert abs(offset - 0.7) < 1e-6 and expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4
    again = load_reward_model(out)  # and back again
    _, ids, tokens, mask = scored(again, tokenizer, talks)
    assert (again.score(again.prefix(ids), tokens, mask)[:, 0] + offset - found).abs().max() < 1e-4


def test_objectives_are_exported_as_named_outputs(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    folder = ours(tmp_path, tokenizer, objectives=["good", "long"])
    out = exported(folder, tmp_path)
    offsets = json.loads(capsys.readouterr().out.splitlines()[-1])["score_offset"]
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "good", "1": "long"} and offsets == pytest.approx([0.7, 0.7])
    tokenizer, talks = load_tokenizer(str(folder)), talks_of(byte_tokenizer(), 8)
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    weights, outputs = torch.tensor([1.0, -0.5]), {"good": 1.0, "long": -0.5}
    found = scores_by_transformers(model, AutoTokenizer.from_pretrained(out), talks)
    expected = (torch.tensor(found) + torch.tensor(offsets)) @ weights
    for source, offset in ((folder, 0.0), (out, 0.35)):  # ours, and the exported one read back: 0.7 - 0.5 * 0.7
        value, ids, tokens, mask = scored(load_reward_model(source, outputs=outputs), tokenizer, talks)
        assert (value.score(value.prefix(ids), tokens, mask)[:, 0] + offset - expected).abs().max() < 1e-4
    with pytest.raises(ModelError, match="is not a classifier; a reward model of ours has a card already"):
        imported(tmp_path / "ours", folder, tmp_path)


def test_what_cannot_be_exported(tmp_path):
    tokenizer = byte_tokenizer()
    with pytest.raises(ModelError, match="--pooling last --input_skip false"):
        exported(ours(tmp_path, tokenizer, pooling="mean"), tmp_path)
    with pytest.raises(ModelError, match="has an input skip"):
        exported(ours(tmp_path, tokenizer, input_skip=True), tmp_path)
    with pytest.raises(ModelError, match="needs no export"):
        exported(classifier(tmp_path / "source", tokenizer), tmp_path)
    shutil.rmtree(tmp_path / "ours")
    folder = ours(tmp_path, byte_tokenizer(template=LLAMA3, bos="<s>", pad="<|im_end|>"))
    with pytest.raises(ModelError, match="--pad_token"):
        exported(folder, tmp_path)
    assert AutoTokenizer.from_pretrained(exported(folder, tmp_path, "--pad_token", "<pad>")).pad_token == "<pad>"


def test_trl_loads_an_exported_model(tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    tokenizer = byte_tokenizer()
    out = exported(ours(tmp_path, tokenizer), tmp_path)
    rows = [
        {
            "prompt": [{"role": "user", "content": p.prompt}],
            "chosen": [{"role": "assistant", "content": p.chosen}],
            "rejected": [{"role": "assistant", "content": p.rejected}],
        }
        for p in pairs_of(4)
    ]
    arguments = RewardConfig(output_dir=str(tmp_path / "trl"), max_steps=1, report_to="none", use_cpu=True, bf16=False)
    trainer = RewardTrainer(model=str(out), args=arguments, train_dataset=Dataset.from_list(rows))
    assert trainer.model.score.weight.shape == (1, 32)
    trainer.train()
