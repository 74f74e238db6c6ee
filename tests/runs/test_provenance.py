"""A base that changed under an artefact is told of; one that did not, whatever its precision, is not."""

from __future__ import annotations

import json

import pytest
import torch

from reward_models.loading import add_lora, load_reward_model, save_reward_model
from reward_models.modelling import RewardModel
from tests.conftest import build_llama, build_tokenizer
from tests.training.tiny import tiny_run
from vgf_llm.answering.pipeline import load_pipeline
from vgf_llm.data.contents import contents
from vgf_llm.errors import ConfigError, OutputError
from vgf_llm.models.loading import load_causal_lm
from vgf_llm.runs.claim import claim
from vgf_llm.runs.provenance import BASE_NAME, folder_mark, model_mark
from vgf_llm.settings import ModelSettings, SamplingSettings


@pytest.fixture
def base(tmp_path):
    """A base model's folder, and a function that puts other weights behind its name."""
    folder = tmp_path / "base"
    build_tokenizer().save_pretrained(folder)
    build_llama().save_pretrained(folder)

    def change(seed=1):
        build_llama(seed=seed).save_pretrained(folder)

    return folder, change


def test_the_mark_is_the_same_in_float32_and_bfloat16_and_none_in_float16(base):
    folder, change = base
    marks = {dtype: model_mark(load_causal_lm(str(folder), dtype=dtype)) for dtype in ("float32", "bfloat16")}
    assert marks["float32"] == marks["bfloat16"]
    assert model_mark(load_causal_lm(str(folder), dtype="float16")) is None
    change()
    assert model_mark(load_causal_lm(str(folder))) != marks["float32"]


def test_a_reward_models_lora_says_when_its_base_changed(base, tmp_path, capsys):
    folder, change = base
    model = RewardModel.from_base(str(folder), num_layers=1)
    save_reward_model(add_lora(model, 2, 4.0), tmp_path / "reward")
    for dtype in (torch.float32, torch.bfloat16):
        load_reward_model(tmp_path / "reward", dtype=dtype)
    assert "WARNING" not in capsys.readouterr().err
    change()
    load_reward_model(tmp_path / "reward")
    assert f"the LoRA '{tmp_path / 'reward'}' was made from other weights than" in capsys.readouterr().err


def test_a_full_reward_model_says_when_its_table_is_not_the_bases(base, tmp_path, capsys):
    folder, change = base
    save_reward_model(RewardModel.from_base(str(folder), num_layers=1), tmp_path / "reward")
    build_tokenizer().save_pretrained(tmp_path / "reward")
    for dtype in ("float32", "bfloat16"):
        models = ModelSettings(str(folder), reward_model=str(tmp_path / "reward"), dtype=dtype, device="cpu")
        load_pipeline(models, SamplingSettings())
    assert "input embeddings differ" not in capsys.readouterr().err
    change()
    load_pipeline(models, SamplingSettings())
    assert "was made from another base model than this one: their input embeddings differ" in capsys.readouterr().err


def test_a_trained_adapter_says_when_its_base_changed(tmp_path, capsys):
    tiny_run(tmp_path, max_steps=1, save_steps=1, dtype="bfloat16")
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert (folder / BASE_NAME).is_file()
        load_causal_lm(str(folder))
    assert "WARNING: the adapter" not in capsys.readouterr().err
    build_llama(seed=1).save_pretrained(tmp_path / "model")
    load_causal_lm(str(tmp_path / "out"))
    assert f"the adapter '{tmp_path / 'out'}' was made from other weights" in capsys.readouterr().err


def test_rows_of_another_base_behind_the_same_name_are_not_mixed(base, tmp_path):
    folder, change = base
    rows, prompts = tmp_path / "run" / "rows.jsonl", tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "the sea"}))
    rows.parent.mkdir()

    def config():
        return {"contents": contents(str(prompts), None, str(folder))}

    claim(rows, config(), resume=False)
    rows.write_text("{}")
    claim(rows, config(), resume=True)
    change()
    with pytest.raises(ConfigError, match="contents"):
        claim(rows, config(), resume=True)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[]", "holds a list where settings")])
def test_rows_with_a_broken_configuration_are_not_mixed(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(OutputError, match=rf"config.json {message}.*; name another output_dir"):
        claim(tmp_path / "rows.jsonl", {}, resume=True)


def test_a_template_that_changed_is_part_of_the_folders_mark(base):
    folder, _ = base
    before = folder_mark(str(folder))
    assert before == folder_mark(str(folder)) and folder_mark("owner/name") is None
    (folder / "chat_template.jinja").write_text("another")
    assert folder_mark(str(folder)) != before
