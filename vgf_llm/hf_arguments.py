"""From a command's settings to transformers' TrainingArguments, the same way for every trainer here.

A setting that TrainingArguments has under the same name is handed on; ``warmup_ratio``, ``save_steps``, ``eval_steps``
mean what their help says. Whatever else TrainingArguments knows can be given by name in ``trainer_arguments``.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from vgf_llm.errors import ConfigError

_TRANSLATED = {"resume_from_checkpoint", "trainer_arguments", "warmup_ratio", "save_steps", "eval_steps"}
_FIXED = {"output_dir", "warmup_steps", "remove_unused_columns"}


def training_arguments(settings: Any, output_dir: str | Path, **fixed: Any) -> TrainingArguments:
    """Translate settings.

    Args:
        settings: A dataclass with ``trainer_arguments``.
        output_dir: Of the training.
        fixed: Further fields that the trainer decides on.

    Raises:
        ConfigError: trainer_arguments names a field that does not exist, one that has a key of its own, or a bad value.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    own = {field.name for field in dataclasses.fields(settings)}
    eval_steps = getattr(settings, "eval_steps", None)
    fields: dict[str, Any] = {name: getattr(settings, name) for name in (own & known) - _TRANSLATED} | {
        "output_dir": str(output_dir),
        "warmup_steps": settings.warmup_ratio,
        "eval_strategy": "steps" if eval_steps else "no",
        "eval_steps": eval_steps,
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
        "disable_tqdm": not sys.stderr.isatty(),
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        fields["bf16"] = True  # what the launch configuration asks for; DeepSpeed refuses to be told two things
    if settings.gradient_checkpointing:
        fields["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    for name in settings.trainer_arguments:
        if name in own | _FIXED | set(fixed):
            raise ConfigError(f"trainer_arguments: {name!r} has a key of its own here, or is fixed; set that one")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"trainer_arguments: transformers' TrainingArguments has no {name!r} (nearest: {near!r})")
    try:
        return TrainingArguments(**(fields | fixed | settings.trainer_arguments))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"trainer_arguments {settings.trainer_arguments}: {error}") from error
