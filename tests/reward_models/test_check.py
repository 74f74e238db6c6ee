"""Planted faults are found with the right line, and sound models of several kinds are passed in silence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from reward_models import check
from reward_models.loading import save_reward_model
from reward_models.modelling import RewardModel
from reward_models.pairs import PairCollator, encode_pairs
from tests.byte_tokenizers import CHATML, byte_tokenizer
from tests.reward_models.checked import (
    by_open_template,
    by_template,
    changed,
    pairs_of,
    plain,
    trained_classifier,
    write_pairs,
)
from tests.reward_models.classifiers import LLAMA3, TOKENIZERS, config_of
from vgf_llm.data.prompts import PreferencePair
from vgf_llm.errors import ConfigError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Trained models by name, each trained once."""
    root, known = tmp_path_factory.mktemp("models"), {}

    def get(name, style="chatml", **options):
        if name not in known:
            known[name] = trained_classifier(root / name, byte_tokenizer(**TOKENIZERS[style]), **options)
        return known[name]

    return get


@pytest.fixture
def copied(made, tmp_path):
    def get(*arguments, **options):
        return shutil.copytree(made(*arguments, **options), tmp_path / "model")

    return get


def lines_of(folder, tmp_path, capsys, pairs=None, **flags):
    """Run the command; returns its exit code and the lines by check."""
    data = write_pairs(tmp_path / "pairs.jsonl", pairs or pairs_of(30))
    more = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    code = check.main(["--reward_model", str(folder), "--dataset", str(data), "--json", "--device", "cpu", *more])
    lines = json.loads(capsys.readouterr().out.splitlines()[-1])["lines"]
    assert code == int(any(line["verdict"] == "fail" for line in lines))
    return code, {line["check"]: line for line in lines}


def spoken(lines):
    return {name: line["verdict"] for name, line in lines.items() if line["verdict"] in ("warn", "fail")}


SOUND = {
    "llama": ("chatml", {"family": "llama"}),
    "qwen": ("chatml", {"family": "qwen"}),
    "neox": ("llama3", {"family": "neox"}),
    "bert": ("none", {"family": "bert", "encode": plain}),
}


@pytest.mark.parametrize("name", sorted(SOUND))
def test_sound_classifiers_are_passed_in_silence(made, tmp_path, capsys, name):
    style, options = SOUND[name]
    code, lines = lines_of(made(name, style, **options), tmp_path, capsys)
    assert spoken(lines) == {} and code == 0, {n: lines[n] for n in spoken(lines)}


def test_a_sound_model_of_ours_is_passed_in_silence(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    base = AutoModelForCausalLM.from_config(config_of("llama", tokenizer))
    torch.manual_seed(0)
    value, optimiser = RewardModel.from_base(base, pooling="mean", input_skip=True), None
    optimiser = torch.optim.AdamW((p for p in value.parameters() if p.requires_grad), lr=5e-3)
    for step in range(30):
        rows, _ = encode_pairs(tokenizer, pairs_of(24, seed=step), 512)
        batch = PairCollator(0)(rows)
        batch.pop("margin")
        chosen, rejected = value.train()(**batch).chunk(2)
        optimiser.zero_grad()
        (-torch.nn.functional.logsigmoid(chosen - rejected).mean()).backward()
        optimiser.step()
    save_reward_model(value.eval(), tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    code, lines = lines_of(tmp_path / "ours", tmp_path, capsys)
    assert spoken(lines) == {} and code == 0, {n: lines[n] for n in spoken(lines)}


def test_padding_unknown_to_the_configuration(copied, tmp_path, capsys):
    folder = changed(copied("llama"), pad_token_id=3)
    _, lines = lines_of(folder, tmp_path, capsys)
    assert lines["padding"]["verdict"] == "fail" and "pad_token_id" in lines["padding"]["advice"]
    assert lines["pad token"]["verdict"] == "fail"


def test_padding_that_is_the_closing_moves_the_position(made, tmp_path, capsys):
    _, lines = lines_of(made("pad_is_eos", "llama3_pad_is_eos"), tmp_path, capsys)
    assert lines["pad token"]["verdict"] == lines["position"]["verdict"] == "warn"
    assert "1 tokens before the end" in lines["position"]["value"]


def test_padding_that_answers_end_in(copied, tmp_path, capsys):
    folder = copied("llama")
    tokenizer = byte_tokenizer(template=CHATML.replace("<|im_end|>\\n", "").replace("<|im_end|>\n", ""))
    dot = tokenizer(".")["input_ids"][0]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(dot)
    tokenizer.save_pretrained(changed(folder, pad_token_id=dot))
    pairs = [PreferencePair(p.prompt, p.chosen + "..", p.rejected) for p in pairs_of(30)]
    _, lines = lines_of(folder, tmp_path, capsys, pairs)
    assert lines["position"]["verdict"] == "fail"


def test_positions_that_shift_under_left_padding(copied, tmp_path, capsys):
    folder = copied("gpt2", family="gpt2")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    _, lines = lines_of(folder, tmp_path, capsys)
    assert lines["padding"]["verdict"] == "fail" and "'right'" in lines["padding"]["advice"]


def test_a_head_that_was_not_saved_under_lora(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config_of("llama", tokenizer)).save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"task_type": "SEQ_CLS"}))
    tokenizer.save_pretrained(folder)
    code, lines = lines_of(folder, tmp_path, capsys)
    assert code == 1 and 'modules_to_save=["score"]' in lines["weights"]["advice"]


def test_a_head_that_is_fresh(copied, tmp_path, capsys):
    folder = copied("llama")
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(5)
    weights["score.weight"] = 0.2 * torch.randn_like(weights["score.weight"])
    direction = load_file(folder / "model.safetensors")["score.weight"]
    weights["score.weight"] -= direction * (weights["score.weight"] * direction).sum() / direction.square().sum()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _, lines = lines_of(folder, tmp_path, capsys)
    assert lines["accuracy"]["verdict"] == "fail"


def test_a_template_that_writes_bos_twice(copied, tmp_path, capsys):
    folder = copied("neox", "llama3", family="neox")
    byte_tokenizer(template="{{ bos_token }}" + LLAMA3, bos="<s>").save_pretrained(folder)
    _, lines = lines_of(folder, tmp_path, capsys)
    assert lines["BOS"]["verdict"] == "fail" and lines["BOS"]["value"].startswith("2 at the start")


def test_a_bos_that_the_template_leaves_out(copied, tmp_path, capsys):
    folder = copied("neox", "llama3", family="neox")
    byte_tokenizer(template=LLAMA3.replace("{{ bos_token }}", ""), bos="<s>", adds="bos").save_pretrained(folder)
    _, lines = lines_of(folder, tmp_path, capsys)
    assert lines["BOS"]["verdict"] in ("warn", "fail") and "template" in lines["BOS"]["advice"]


def test_a_template_that_was_not_there_in_training(made, tmp_path, capsys):
    folder = made("plain", encode=plain, untaught=by_template, steps=110)
    _, lines = lines_of(folder, tmp_path, capsys)
    assert lines["template"]["verdict"] == "fail" and "plain text" in lines["template"]["advice"]


def test_a_closing_that_was_not_there_in_training(made, tmp_path, capsys):
    folder = made("open", encode=by_open_template, untaught=by_template, steps=110)
    _, lines = lines_of(folder, tmp_path, capsys)
    assert lines["closing"]["verdict"] == "fail" and "open answers" in lines["closing"]["advice"]


def test_a_head_of_zeros_and_weights_that_are_not_numbers(copied, tmp_path, capsys):
    folder = copied("llama")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"score.weight": weights["score.weight"] * 0}, folder / "model.safetensors", {"format": "pt"})
    _, lines = lines_of(folder, tmp_path, capsys)
    assert spoken(lines) == {"spread": "fail"}
    weights["score.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _, lines = lines_of(folder, tmp_path, capsys)
    assert spoken(lines) == {"numbers": "fail"}


def test_a_reversed_sign(copied, tmp_path, capsys):
    folder = copied("llama")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"score.weight": -weights["score.weight"]}, folder / "model.safetensors", {"format": "pt"})
    _, lines = lines_of(folder, tmp_path, capsys)
    assert lines["accuracy"]["verdict"] == "fail" and "sign is reversed" in lines["accuracy"]["advice"]


def test_a_score_that_counts_tokens(tmp_path, capsys):
    code, lines = lines_of("length_words", tmp_path, capsys)
    assert lines["length"]["verdict"] == "warn" and lines["accuracy"]["verdict"] == "fail" and code == 1


def test_differences_that_are_no_log_odds(made, tmp_path, capsys):
    """A quarter of the labels are wrong, and the model is sure of every pair."""
    pairs = [PreferencePair(p.prompt, p.rejected, p.chosen) if i % 4 == 0 else p for i, p in enumerate(pairs_of(40))]
    _, lines = lines_of(made("llama"), tmp_path, capsys, pairs)
    assert lines["calibration"]["verdict"] == "warn" and "divide scores by" in lines["calibration"]["advice"]


def test_conversations_that_are_too_long_and_pairs_that_are_equal(made, tmp_path, capsys):
    pairs = pairs_of(20)
    pairs[3] = PreferencePair(pairs[3].prompt, "rain " * 600, "No.")
    pairs[4] = PreferencePair(pairs[4].prompt, "The same.", "The same.")
    _, lines = lines_of(made("llama"), tmp_path, capsys, pairs)
    assert lines["truncation"]["verdict"] == "fail" and "left out" in lines["truncation"]["advice"]
    assert lines["pairs"]["verdict"] == "warn" and lines["pairs"]["value"].startswith("19 of 20 pairs used")


def test_functions(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import random\n"
        "def noisy(prompts, responses): return [random.random() for _ in responses]\n"
        "def asks(prompts, responses, answer): return [0.0 for _ in responses]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    _, lines = lines_of("mine:noisy", tmp_path, capsys)
    assert lines["batch size"]["verdict"] == "fail"
    with pytest.raises(ConfigError, match="asks takes 'answer', and the prompts' rows have no such column"):
        lines_of("mine:asks", tmp_path, capsys)


def test_built_in_pairs_and_the_table(made, tmp_path, capsys):
    recipe = tmp_path / "generate.yaml"
    recipe.write_text(f"reward_model: {made('llama')}\nbudget: {{nats: 2}}\n")
    for first in (str(made("llama")), str(recipe)):
        check.main([first, "--device", "cpu"])
        shown = capsys.readouterr().err
        assert "Check of llama" in shown and "32 of 32 pairs" in shown and shown.rstrip().endswith("skip")
    recipe.write_text("prompts: a.jsonl\n")
    with pytest.raises(ConfigError, match="has neither reward_model nor output_dir"):
        check.main([str(recipe)])


def test_a_classifier_that_names_no_padding_is_scored_one_by_one(copied, tmp_path, capsys):
    folder = changed(copied("llama"), pad_token_id=None)
    _, lines = lines_of(folder, tmp_path, capsys, pairs_of(10))
    assert spoken(lines) == {"padding": "warn"} and lines["batch size"]["verdict"] == "skip"


def test_a_token_classifier_whose_padding_is_the_eos_is_read_at_the_eos(made, tmp_path, capsys):
    """Only a sequence classifier looks for its last token by the padding's id."""
    source = made("pad_is_eos", "llama3_pad_is_eos")
    model = AutoModelForTokenClassification.from_pretrained(source, num_labels=1)
    model.save_pretrained(tmp_path / "tokens")
    byte_tokenizer(**TOKENIZERS["llama3_pad_is_eos"]).save_pretrained(tmp_path / "tokens")
    _, lines = lines_of(tmp_path / "tokens", tmp_path, capsys, pairs_of(10))
    assert lines["read here"]["verdict"] == "pass" and lines["position"]["verdict"] == "skip"
