"""The real model: two steps of the recipe without a reward model, and its adapter read by plain libraries."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from reward_models.loading import load_reward_model
from vgf_llm.models.loading import load_tokenizer
from vgf_llm.settings import SamplingSettings
from vgf_llm.settings.parse import parse
from vgf_llm.train import build_trainer
from vgf_llm.training.policy_models import response_logps
from vgf_llm.training.settings import OptimSettings, PolicySettings, TrainScript, VGFSettings

RECIPE = "recipes/smollm2_sentiment/vgf_function.yaml"


@pytest.mark.slow
def test_two_steps_and_the_adapter_gives_the_trainers_log_probabilities_in_plain_peft(tmp_path):
    kinds = (TrainScript, PolicySettings, VGFSettings, OptimSettings, SamplingSettings)
    flags = "--max_steps 2 --logging_steps 2 --dtype float32 --per_device_train_batch_size 2 --num_particles 4"
    argv = ["--config", RECIPE, "--output_dir", str(tmp_path), *flags.split()]
    trainer = build_trainer(*parse(*kinds, argv=argv))
    trainer.train()
    trainer.save_model()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 2 and line["changed_tokens"] >= 0 and line["value/value_error"] > 0

    tokenizer = load_tokenizer(str(tmp_path))
    prompt = trainer.train_dataset[0].ids
    ids = torch.tensor([prompt + tokenizer("The sea is calm and blue today.")["input_ids"]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "length": ids.shape[1] - len(prompt)}
    base_folder = trainer.models.policy.peft_config["default"].base_model_name_or_path
    trainer.model.eval()
    # 30 layers round by 1e-5 in float32 wherever another kernel is used; in float64 nothing but the weights can differ.
    for dtype, bound in ((torch.float32, 5e-5), (torch.float64, 1e-8)):
        policy = trainer.models.policy.to(dtype)
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
        plain = PeftModel.from_pretrained(base, str(tmp_path)).eval().to(dtype)
        with torch.no_grad():
            ours = response_logps(policy, **inputs)
            for theirs in (response_logps(plain, **inputs), response_logps(plain.merge_and_unload(), **inputs)):
                torch.testing.assert_close(theirs, ours, atol=bound, rtol=0)
    assert load_reward_model(tmp_path / "value", tokenizer=tokenizer).config.pooling == "mean"
