"""From a command's settings to transformers' TrainingArguments, the same way for every trainer here.

A setting that TrainingArguments has under the same name is handed on; ``warmup_ratio``, ``save_steps``, ``eval_steps``
mean what their help says. Whatever else TrainingArguments knows can be given by name in ``trainer_arguments``.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from vgf_llm.errors import ConfigError
from vgf_llm.precision import choose_autocast

_TRANSLATED = {"resume_from_checkpoint", "trainer_arguments", "warmup_ratio", "save_steps", "eval_steps"}
_FIXED = {"output_dir", "warmup_steps", "remove_unused_columns"}
_NAMES: dict[str, Any] = {
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
    "save_strategy": SaveStrategy,
    "logging_strategy": IntervalStrategy,
    "eval_strategy": IntervalStrategy,
    "hub_strategy": HubStrategy,
}
_EVALUATES = {"eval_strategy": "no", "do_eval": False, "eval_on_start": False, "load_best_model_at_end": False}
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
    fields["bf16"] = choose_autocast(settings)
    if settings.gradient_checkpointing:
        fields["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    for name in settings.trainer_arguments:
        if name in own | _FIXED | set(fixed):
            raise ConfigError(f"trainer_arguments: {name!r} has a key of its own here, or is fixed; set that one")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"trainer_arguments: transformers' TrainingArguments has no {name!r} (nearest: {near!r})")
    values = fields | fixed | settings.trainer_arguments
    _check_names(values, own)
    _check_reports(values.get("report_to"), own)
    _check_supported(settings.trainer_arguments, evaluates="eval_steps" in own)
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        given = f"trainer_arguments {settings.trainer_arguments}" if settings.trainer_arguments else "settings"
        raise ConfigError(f"{given}: {error}") from error


def _key(name: str, own: set[str]) -> str:
    """Where a user sets a field."""
    return name if name in own else f"trainer_arguments: {name}"


def _check_names(values: dict[str, Any], own: set[str]) -> None:
    """Refuse a choice that transformers does not know."""
    for name, kind in _NAMES.items():
        valid = [str(member.value) for member in kind]
        value = values.get(name, valid[0])
        value = str(getattr(value, "value", value))
        if value not in valid:
            near = difflib.get_close_matches(value, valid, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{_key(name, own)}: {value!r} is unknown (nearest: {near!r}); choose from {', '.join(valid)}"
            )


def _check_reports(wanted: Any, own: set[str]) -> None:
    """Refuse to report to what transformers does not know, or what is not installed."""
    valid = sorted(INTEGRATION_TO_CALLBACK)
    for name in [wanted] if isinstance(wanted, str) else wanted or []:
        if name in ("none", "all"):
            continue
        if name not in valid:
            raise ConfigError(
                f"{_key('report_to', own)}: {name!r} is unknown; choose from none, all, {', '.join(valid)}"
            )
        installed = get_available_reporting_integrations()
        if name not in installed and name not in _NOT_FOUND_BY_NAME:
            raise ConfigError(
                f"{_key('report_to', own)}: {name!r} needs its package, which is not installed; install it, or choose "
                f"from {', '.join(['none', *installed])}"
            )


def _check_supported(given: dict[str, Any], evaluates: bool) -> None:
    """Refuse what no trainer here does, and evaluation where there is nothing to evaluate on."""
    if given.get("save_on_each_node"):
        raise ConfigError(
            f"trainer_arguments: save_on_each_node: {given['save_on_each_node']!r} is not supported, a checkpoint is "
            "one folder; leave it out, and put output_dir on a filesystem that all machines share"
        )
    if evaluates:
        return
    off = {name: value for name, value in _EVALUATES.items() if given.get(name, value) not in (value, None)}
    if given.get("save_strategy") == "best":
        off["save_strategy"] = "steps"
    for name, valid in off.items():
        raise ConfigError(
            f"trainer_arguments: {name}: {given[name]!r} needs data to evaluate on, which this trainer does not take; "
            f"leave it out ({valid!r}), and see metrics.jsonl"
        )
