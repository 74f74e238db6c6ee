"""The sentiment recipe's value: a few steps on a tiny model, and a short run on the real one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reward_models.train_value import main as value
from tests.conftest import build_llama, build_tokenizer

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smollm2_sentiment" / "value.yaml"


@pytest.mark.parametrize("lora_r", [0, 2])
def test_two_steps_of_the_value_on_a_tiny_model(tmp_path, monkeypatch, capsys, lora_r):
    monkeypatch.chdir(ROOT)  # the recipe's data
    build_llama().save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    changes = {
        "model_name_or_path": tmp_path / "base",
        "output_dir": tmp_path / "value",
        "lora_r": lora_r,
        "limit": 8,
        "eval_limit": 4,
        "max_length": 96,
        "max_steps": 2,
        "warmup_ratio": 0.0,
        "bf16": "false",
        "fidelity_responses": 2,
    }
    assert value(["--config", str(RECIPE), *(t for key, x in changes.items() for t in (f"--{key}", str(x)))]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["steps"] == 2 and figures["value_error"] > 0


@pytest.mark.slow
def test_a_short_run_on_the_real_model_learns(tmp_path):
    """A quarter of the recipe's steps explain a part of the variance and rank most pairs rightly; 1 to 2 minutes."""
    command = [sys.executable, "-m", "vgf_llm.cli", "value", "--config", str(RECIPE), "--output_dir", str(tmp_path)]
    command += ["--max_steps", "40", "--fidelity_responses", "8", "--fidelity_substitutions", "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["accuracy"] > 0.6 and figures["explained_variance"] > 0.05 and figures["fidelity"] > 0.3
