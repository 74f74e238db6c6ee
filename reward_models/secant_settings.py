"""Settings of the secant head's fit. Imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vgf_llm.errors import require, require_sampling_seed, require_training_seed
from vgf_llm.settings import BaseModelSettings, DtypeName


@dataclass(frozen=True, kw_only=True)
class SubstitutionSettings(BaseModelSettings):
    """Prompts, samples and measurement of what is fitted to exact changes of token substitutions."""

    model_name_or_path: str = "default"
    """Base causal LM, the reference: "default" (embedded SmolLM2-135M-Instruct), a local folder, or a hub name."""
    reward_outputs: dict[str, float] = field(default_factory=dict)
    """Weights of the reward model's outputs, by name or number; needed where it has several."""
    prompts: str
    """Prompts that responses are sampled to for the fit: a file, glob or folder, or a hub data set."""
    validation_prompts: str
    """Other prompts, on which fidelity is measured before and after; they are never fitted to."""
    prompt_column: str = "prompt"
    """Column of both prompt files, text or messages."""
    system_column: str = field(default="system", kw_only=True)
    """Column of a system turn that goes before the prompt, where rows have it."""
    num_prompts: int | None = None
    """Prompts fitted to, from the first; null takes all."""
    num_validation_prompts: int | None = 30
    """Prompts measured on, from the first; null takes all."""
    dtype: DtypeName = "auto"
    """Parameter dtype of the base model, which only samples; "auto": bfloat16 where the device has units for it. The
    reward model is float32: the changes that the head learns from are small."""
    device: str = "auto"
    """Torch device, or "auto": cuda where there is one, else cpu."""
    responses: int = 2
    """Responses sampled from the base to each prompt, for the fit and for the measurement, at least 1."""
    validation_substitutions: int = 120
    """Substitutions per response that fidelity is measured on, at least 9."""
    shortlist: int = 30
    """Length of the base model's shortlist that substitutions come from, at least 2."""
    seed: int = 0
    """Of the sampled responses and substitutions."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        require_sampling_seed("seed", self.seed, runs=2)
        require(self.responses >= 1, "responses", self.responses, "at least 1")
        found = self.validation_substitutions
        require(found >= 9, "validation_substitutions", found, "at least 9")
        require(self.shortlist >= 2, "shortlist", self.shortlist, "at least 2")
        for key in ("num_prompts", "num_validation_prompts"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "null or at least 1")


@dataclass(frozen=True, kw_only=True)
class SecantScript(SubstitutionSettings):
    """Reward model, prompts and output."""

    reward_model: str
    """Folder of the trained reward model (or adapter) whose changes are fitted."""


@dataclass(frozen=True)
class SecantTraining:
    """How the head is fitted."""

    base: Literal["skip", "gradient", "none"] = "skip"
    """What the head adds to: the input skip's direction, the value's own gradient (a backward pass), or nothing."""
    substitutions: int = 32
    """Substitutions scored in each response, at least 1: this is what the fit costs."""
    steps: int = 600
    """Optimiser steps, at least 1."""
    batch_size: int = 512
    """Substitutions per step, at least 1."""
    learning_rate: float = 1.0e-3
    """Peak learning rate of AdamW (cosine to 0), above 0."""
    weight_decay: float = 0.01
    """AdamW weight decay, at least 0."""
    dropout: float = 0.1
    """Share of the head's inputs that is dropped while fitting, in [0, 1)."""
    hidden: int = 256
    """Units between the two layers, at least 1."""
    fit_seed: int = 0
    """Of the first layer and the batches."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        require_training_seed("fit_seed", self.fit_seed)
        require(self.base in ("skip", "gradient", "none"), "base", self.base, '"skip", "gradient" or "none"')
        for key in ("substitutions", "steps", "batch_size", "hidden"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
