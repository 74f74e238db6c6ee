"""Reward and value training on two processes whose engine splits the weights: what is saved is the base, trained."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reward_models.loading import load_reward_model
from tests.conftest import build_llama, build_tokenizer
from tests.reward_models.test_training import toy_rows
from tests.training.launch import ROOT, launch

RATE, STEPS = 1e-3, 3


def train(folder: Path, module: str, engine: str, lora_r: int, precision: str = "no") -> Path:
    """Run two or three steps of a training under one of the launch configurations; returns its output folder."""
    base, data, out = folder / "base", folder / "train.jsonl", folder / "out"
    build_llama(tied=False).save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    rng = random.Random(0)
    rows = toy_rows(40)
    if module.endswith("value"):
        rows = [{"prompt": r["prompt"], "response": r["chosen"], "reward": rng.random()} for r in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "train_dataset": data,
        "model_name_or_path": base,
        "output_dir": out,
        "eval_share": 0.2,
        "max_length": 64,
        "max_steps": STEPS,
        "warmup_ratio": 0.0,
        "learning_rate": RATE,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "input_skip": "true",
        "pooling": "mean",
        "lora_r": lora_r,
        "fidelity_responses": 4,
        "fidelity_substitutions": 12,
    }
    flags = [part for key, value in keys.items() for part in (f"--{key}", value)]
    config = ROOT / "recipes" / "accelerate_configs" / f"{engine}.yaml"
    launch(config, "--mixed_precision", precision, "-m", module, *flags, timeout=240)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "engine", "lora_r"),
    [
        ("reward_models.train", "zero3", 0),
        ("reward_models.train", "zero3", 4),
        ("reward_models.train", "fsdp2", 0),
        ("reward_models.train_value", "zero3", 0),
        ("reward_models.train_value", "zero3", 4),
    ],
)
def test_what_is_saved_is_the_base_trained_for_a_few_steps(tmp_path: Path, module: str, engine: str, lora_r: int):
    """Frozen weights are the base's bit for bit; Adam moves a trained one by at most about its rate at a step."""
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    out = train(tmp_path, module, engine, lora_r)
    base = load_file(tmp_path / "base" / "model.safetensors")
    card = json.loads((out / "reward_card.json").read_text())
    assert card["training"]["steps"] == STEPS and card["fidelity"] is not None
    model = load_reward_model(out)
    assert model.head.weight.abs().max() > 0
    moved = 0
    for name, tensor in model.body.state_dict().items():
        if name == "embed_tokens.weight":
            assert torch.equal(tensor, base[f"model.{name}"])
        elif f"model.{name}" in base:
            change = (tensor - base[f"model.{name}"]).abs().max()
            # rank 4 of alpha 32 is scaled by 8; the second factor starts at 0 and moves by a rate a step
            assert change <= (STEPS * RATE * 1.5 if lora_r == 0 else 0.2), name
            moved += int(change > 0)
    assert moved > 5
    checkpoint = out / "checkpoint-2"
    assert (checkpoint / ("adapter_model.safetensors" if lora_r else "model.safetensors")).is_file()
    again = load_reward_model(checkpoint, tokenizer=None)
    assert torch.equal(again.embedding_table_VD, model.embedding_table_VD)


@pytest.mark.slow
def test_under_bfloat16_the_saved_weights_are_the_float32_copy_and_the_frozen_ones_the_bases(tmp_path: Path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    saved = load_file(train(tmp_path, "reward_models.train", "zero3", 0, "bf16") / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert torch.equal(saved["body.embed_tokens.weight"], base["model.embed_tokens.weight"])
    trained = saved["body.layers.0.mlp.down_proj.weight"]
    assert trained.dtype == torch.float32 and not torch.equal(trained, trained.bfloat16().float())
