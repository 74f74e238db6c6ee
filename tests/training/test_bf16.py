"""The command under the launch configurations as they stand, bfloat16 included, on two CPU processes."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

from tests.training.launch import ROOT, launch
from tests.training.tiny import write_inputs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "fsdp2"])
def test_it_trains_policy_value_and_secant_head(tmp_path: Path, name: str) -> None:
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    model, prompts = write_inputs(tmp_path)
    keys = {
        "prompts": prompts,
        "model_name_or_path": model,
        "output_dir": tmp_path / "out",
        "rewards": '["tests.training.tiny:good_words"]',
        "value": "learned",
        "learned_value.num_layers": 1,
        "learned_value.gradient": "secant",
        "gradient_checkpointing": "true",
        "num_particles": 4,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "max_new_tokens": 8,
        "top_k": 20,
    }
    flags = [part for key, value in keys.items() for part in (f"--{key}", value)]
    launch(ROOT / "recipes" / "accelerate_configs" / f"{name}.yaml", "-m", "vgf_llm.train", *flags, timeout=200)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert lines[-1]["policy/kl"] != 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "value" / "secant.safetensors").is_file()
