"""From the settings of a run to transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from typing import Any

import torch
from transformers import TrainingArguments

from vgf_llm.errors import ConfigError
from vgf_llm.training.config import OptimSettings

_OURS = ("resume_from_checkpoint", "allow_changes", "trainer_arguments", "save_steps", "warmup_ratio")


def training_arguments(optim: OptimSettings, output_dir: str) -> TrainingArguments:
    """Translate the settings.

    Raises:
        ConfigError: trainer_arguments names a field that does not exist, one that has a key of its own, or a bad value.
    """
    fields: dict[str, Any] = {
        field.name: getattr(optim, field.name) for field in dataclasses.fields(optim) if field.name not in _OURS
    }
    fields |= {
        "output_dir": output_dir,
        "warmup_steps": optim.warmup_ratio,
        "logging_strategy": "steps",
        "save_strategy": "steps" if optim.save_steps else "no",
        "save_steps": optim.save_steps or 500,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": not sys.stderr.isatty(),
        "use_cpu": not torch.cuda.is_available(),
    }
    if optim.gradient_checkpointing:
        fields["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    own = {field.name for field in dataclasses.fields(optim)} | {"output_dir", "warmup_steps", "remove_unused_columns"}
    for name in optim.trainer_arguments:
        if name in own:
            raise ConfigError(f"trainer_arguments: {name!r} has a key of its own here, or is fixed; set that one")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"trainer_arguments: transformers' TrainingArguments has no {name!r} (nearest: {near!r})")
    try:
        return TrainingArguments(**(fields | optim.trainer_arguments))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training arguments: {error}") from error
