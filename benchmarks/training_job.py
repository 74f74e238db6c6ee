"""One training run of the comparison: what it is, and what its folder holds.

    <output_dir>/mark_1 ... mark_4    adapters, evenly spaced in training time
    <output_dir>/result.json          written last: marks, steps, seconds a step, peak memory, settings

This module imports nothing heavy: what starts the runs must not weigh on their memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.settings.parse import dump

RESULT_NAME = "result.json"
Method = Literal["vgf", "grpo", "rloo", "dpo"]
Clock = Literal["wall", "processor"]


@dataclass(frozen=True)
class Job:
    """One method, one learning rate, one seed, for a number of minutes."""

    method: Method
    """vgf (ours), or TRL's grpo, rloo or dpo."""
    output_dir: str
    """Folder for adapters and result.json."""
    learning_rate: float
    """Constant learning rate of AdamW, above 0."""
    minutes: float = 10.0
    """Training time in minutes, above 0."""
    clock: Clock = "wall"
    """wall, or processor: on a shared machine, where a method's wall time is also that of its neighbours."""
    prompts: str = "recipes/smollm2_sentiment/data/prompts_train.jsonl"
    """Training prompts."""
    recipe: str = "recipes/smollm2_sentiment/vgf.yaml"
    """Recipe of our trainer; the fields above and below override it."""
    seed: int = 0
    """Of adapters, data order and samples."""
    marks: int = 4
    """Adapters saved, evenly spaced in time, at least 1."""
    prompts_per_step: int = 4
    """Prompts an optimiser step."""
    num_generations: int = 8
    """Responses a prompt, at least 2."""
    lora_r: int = 16
    """LoRA rank, on all linear layers but the output layer."""
    lora_alpha: float = 32.0
    """LoRA scale."""
    max_steps: int = 1_000_000
    """Optimiser steps that end a run before its time; for smoke tests."""

    def __post_init__(self) -> None:
        """Validate ranges.

        Raises:
            ValueError: Naming the key and the value seen.
        """
        for key in ("learning_rate", "minutes", "lora_alpha"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} must be above 0, got {getattr(self, key)}")
        for key in ("marks", "prompts_per_step", "lora_r", "max_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2, got {self.num_generations}")

    def mark(self, number: int) -> Path:
        """Return the folder of an adapter, numbered from 1."""
        return Path(self.output_dir) / f"mark_{number}"


def identity(job: Job, models: ModelSettings, sampling: SamplingSettings) -> dict[str, Any]:
    """Return the settings that decide the result of a run, as result.json has them."""
    config = dump(job, models, sampling)
    config.pop("output_dir")
    return config
