"""Precision follows the device's units; what an optimiser changes is float32."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from reward_models.settings import RewardModelSettings, RewardTraining
from tests.training.tiny import settings as tiny_settings
from vgf_llm.errors import ConfigError
from vgf_llm.machine import precision
from vgf_llm.machine.precision import (
    choose_autocast,
    choose_dtype,
    for_training,
    has_units,
    require_float32,
    with_dtype,
)
from vgf_llm.settings import ModelSettings
from vgf_llm.train import build_trainer
from vgf_llm.training.settings import OptimSettings, PolicySettings


@pytest.fixture
def units(monkeypatch):
    """Return a function that says which half precisions the device has units for; no launcher is about."""
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def pretend(*halves: str) -> None:
        monkeypatch.setattr(precision, "has_units", lambda dtype, device="auto": dtype in ("float32", *halves))
        monkeypatch.setattr(precision, "_warned", set())
        monkeypatch.setattr(precision, "slowdown", lambda dtype, device="cpu": 17.4)

    return pretend


def test_auto_is_bfloat16_only_where_there_are_units(units):
    units("bfloat16")
    assert choose_dtype("auto") == "bfloat16" and with_dtype(ModelSettings()).dtype == "bfloat16"
    units()
    assert choose_dtype("auto") == "float32" and with_dtype(ModelSettings()).dtype == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_stated_dtype_without_units_runs_after_one_loud_line_with_the_factor(units, capsys, dtype):
    units()
    assert [choose_dtype(dtype) for _ in range(3)] == [dtype] * 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"WARNING: dtype {dtype}: this cpu has no units for {dtype}")
    assert "17 times as long" in lines[0] and "dtype: auto" in lines[0]


def test_other_processes_of_a_machine_say_nothing(units, capsys, monkeypatch):
    units()
    monkeypatch.setenv("LOCAL_RANK", "1")
    choose_dtype("bfloat16")
    assert capsys.readouterr().err == ""


def test_without_onednns_bfloat16_a_cpu_has_no_units():
    """oneDNN is told to use AVX2 at most, as on a laptop: its own answer, in a process of its own."""
    code = "from vgf_llm.machine.precision import choose_dtype; print(choose_dtype('auto', 'cpu'))"
    limited = {"ONEDNN_MAX_CPU_ISA": "AVX2", "PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=limited, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "float32", done.stderr[-2000:]


def test_the_devices_own_answer_is_a_bool_and_float32_has_units_everywhere():
    assert has_units("float32", "cpu") is True
    assert isinstance(has_units("bfloat16", "cpu"), bool)


@pytest.mark.parametrize(
    ("lora_r", "launch", "expected"),
    [
        (0, {}, ("float32", True)),
        (8, {}, ("bfloat16", True)),
        (0, {"ACCELERATE_MIXED_PRECISION": "bf16"}, ("float32", True)),
        (8, {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "true"}, ("float32", True)),
        (8, {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_DEEPSPEED": "true"}, ("float32", False)),
        (8, {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true"}, ("float32", False)),
        (8, {"ACCELERATE_MIXED_PRECISION": "fp16"}, ("bfloat16", False)),
    ],
)
def test_auto_in_training_with_units(units, monkeypatch, lora_r, launch, expected):
    """Trained weights and sharded models are float32; autocast follows the launch configuration, then the device."""
    units("bfloat16")
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    for model, training in (
        (PolicySettings(lora_r=lora_r), OptimSettings()),
        (RewardModelSettings(lora_r=lora_r), RewardTraining()),
    ):
        model, training = for_training(model, training)
        assert (model.dtype, training.bf16) == expected


@pytest.mark.parametrize(
    ("launched", "settings", "asked"),
    [
        ("bf16", {"bf16": False}, "bf16: false"),
        ("fp16", {"bf16": True}, "bf16: true"),
        ("bf16", {"trainer_arguments": {"fp16": True}}, "trainer_arguments: {fp16: true}"),
    ],
)
def test_settings_and_launch_that_contradict_each_other_are_refused(units, monkeypatch, launched, settings, asked):
    units("bfloat16", "float16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    for training in (OptimSettings, RewardTraining):
        with pytest.raises(
            ConfigError, match=rf"^{re.escape(asked)}, and the launch asks for mixed_precision {launched}"
        ):
            choose_autocast(training(**settings))


def test_auto_in_training_without_units_is_float32_throughout(units):
    units()
    for lora_r in (0, 8):
        model, training = for_training(PolicySettings(lora_r=lora_r), OptimSettings())
        assert (model.dtype, training.bf16) == ("float32", False)


def test_stated_bf16_without_units_is_used_and_said(units, capsys):
    units()
    assert for_training(PolicySettings(), OptimSettings(bf16=True))[1].bf16 is True
    assert "WARNING: bf16: true: this cpu has no units" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("settings", [PolicySettings, RewardModelSettings])
def test_full_training_in_half_precision_is_refused_with_the_option_that_mends_it(units, settings, dtype):
    units("bfloat16", "float16")
    with pytest.raises(ConfigError, match=rf"^dtype: {dtype} with lora_r: 0 .*set dtype: float32"):
        for_training(settings(dtype=dtype, lora_r=0), OptimSettings())


def test_deepspeed_in_mixed_precision_keeps_a_float32_copy_and_is_let_pass(units, monkeypatch):
    units("bfloat16")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert for_training(PolicySettings(dtype="bfloat16", lora_r=0), OptimSettings())[0].dtype == "bfloat16"


def test_a_trainer_refuses_trained_weights_in_half_precision(tmp_path):
    trainer = build_trainer(*tiny_settings(tmp_path))
    require_float32(trainer)
    next(p for p in trainer.model.parameters() if p.requires_grad).data = torch.zeros(1, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="is bfloat16, which cannot hold small steps; load the model with dtype"):
        require_float32(trainer)


def test_a_value_learned_in_full_beside_a_bfloat16_base_is_float32_and_moves(tmp_path):
    """At a rate of 1e-5 a bfloat16 body stands still: three in a hundred of its weights moved."""
    trainer = build_trainer(
        *tiny_settings(tmp_path, dtype="bfloat16", max_steps=2, warmup_ratio=0.0, learned={"learning_rate": 1e-5})
    )
    body = trainer.learned.model.body
    before = {name: p.detach().clone() for name, p in body.named_parameters() if p.requires_grad}
    assert {p.dtype for p in before.values()} == {torch.float32}
    trainer.train()
    moved = sum(int((dict(body.named_parameters())[name] != p).sum()) for name, p in before.items())
    assert moved > 0.9 * sum(p.numel() for p in before.values())
