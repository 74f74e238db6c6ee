"""Settings that trainers share: LoRA and optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vgf_llm.errors import require, require_training_seed


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters around the layers that are trained."""

    lora_r: int = 0
    """LoRA rank; 0 trains all weights."""
    lora_alpha: float = 32.0
    """LoRA scale; updates count lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' inputs, in [0, 1)."""
    lora_target_modules: list[str] = field(default_factory=list)
    """Leaf names of linear layers; empty takes all but the output layer."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        require(self.lora_r >= 0, "lora_r", self.lora_r, "at least 0")
        require(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "above 0")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "in [0, 1)")


@dataclass(frozen=True)
class OptimiserSettings:
    """Optimisation, logging and checkpoints; names are those of transformers' TrainingArguments."""

    learning_rate: float = 2.0e-5
    """Peak learning rate of AdamW, above 0."""
    max_steps: int = -1
    """Optimiser steps; -1 trains num_train_epochs."""
    num_train_epochs: float = 1.0
    """Passes over the training rows where max_steps is -1."""
    per_device_train_batch_size: int = 8
    """Rows per device and forward."""
    gradient_accumulation_steps: int = 1
    """Forwards per optimiser step."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises, in [0, 1)."""
    weight_decay: float = 0.0
    """AdamW weight decay, at least 0."""
    bf16: bool | Literal["auto"] = "auto"
    """Autocast to bfloat16 in training (parameters keep their dtype); "auto": where the device has units for it."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, a third more time."""
    logging_steps: int = 10
    """Steps between log lines."""
    save_steps: int | None = None
    """Steps between checkpoints; null saves the result only."""
    seed: int = 0
    """Of initial weights, data order and noise; 0 to 2**32 - 1."""
    report_to: str = "none"
    """Where metrics go besides metrics.jsonl: none, tensorboard, wandb, ..."""
    trainer_arguments: dict[str, Any] = field(default_factory=dict)
    """Further fields of transformers' TrainingArguments, by name."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        require_training_seed("seed", self.seed)
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        require(self.max_steps == -1 or self.max_steps >= 1, "max_steps", self.max_steps, "-1 or at least 1")
        require(self.num_train_epochs > 0, "num_train_epochs", self.num_train_epochs, "above 0")
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(self.save_steps is None or self.save_steps >= 1, "save_steps", self.save_steps, "null or at least 1")
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "in [0, 1)")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
