"""From a command's settings to transformers' TrainingArguments, the same way for every trainer here.

A setting that TrainingArguments has under the same name is handed on; ``warmup_ratio``, ``save_steps``, ``eval_steps``
mean what their help says. Whatever else TrainingArguments knows can be given by name in ``trainer_arguments``.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import accelerate.utils.other as accelerate_models
import torch
from accelerate.utils.imports import is_deepspeed_available
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from vgf_llm.errors import ConfigError
from vgf_llm.machine.precision import choose_autocast
from vgf_llm.settings.trainer_names import TRANSLATED, check_trainer_settings, refuse_tracker

_NOT_FOUND_BY_NAME = {"flyte"}  # transformers does not list it among what is installed


def training_arguments(settings: Any, output_dir: str | Path, **fixed: Any) -> TrainingArguments:
    """Translate settings.

    Args:
        settings: A dataclass with ``trainer_arguments``.
        output_dir: Of the training.
        fixed: Further fields that the trainer decides on.

    Raises:
        ConfigError: trainer_arguments names a field that does not exist, one that has a key of its own, or a bad value;
            or another setting has a value that transformers does not know.
    """
    check_trainer_settings(settings, fixed)
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    own = {field.name for field in dataclasses.fields(settings)}
    eval_steps = getattr(settings, "eval_steps", None)
    fields: dict[str, Any] = {name: getattr(settings, name) for name in (own & known) - TRANSLATED} | {
        "output_dir": str(output_dir),
        "warmup_steps": settings.warmup_ratio,
        "eval_strategy": "steps" if eval_steps else "no",
        "eval_steps": eval_steps,
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    fields["bf16"] = choose_autocast(settings)
    if settings.gradient_checkpointing:
        fields["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    values = fields | fixed | settings.trainer_arguments
    _check_installed(values.get("report_to"), own)
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        given = f"trainer_arguments {settings.trainer_arguments}" if settings.trainer_arguments else "settings"
        raise ConfigError(f"{given}: {error}") from error
    load_deepspeed_only_where_asked(arguments)
    return arguments


def _check_installed(wanted: Any, own: set[str]) -> None:
    """Refuse to report to what transformers itself finds unusable, such as a tracker that is switched off."""
    for name in [wanted] if isinstance(wanted, str) else wanted or []:
        if name in ("none", "all"):
            continue
        installed = get_available_reporting_integrations()
        if name not in installed and name not in _NOT_FOUND_BY_NAME:
            refuse_tracker(name, installed, own)


def load_deepspeed_only_where_asked(arguments: TrainingArguments) -> None:
    """Keep accelerate from importing DeepSpeed for a training that does not use it.

    It does so whenever the package is installed, to look whether a model is wrapped by it.
    """
    asked = bool(arguments.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true")
    accelerate_models.is_deepspeed_available = is_deepspeed_available if asked else _is_not_asked_for


def _is_not_asked_for() -> bool:
    return False
