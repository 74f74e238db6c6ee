"""Names that transformers' Trainer knows, read from its source: checked in milliseconds, before it is imported.

The fields of TrainingArguments, the choices of those that have some, and the trackers. A name that is not among them is
an error under the key that the user set it with.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vgf_llm.errors import ConfigError
from vgf_llm.settings.renamed import line_of, now_called

TRANSLATED = {"trainer_arguments", "warmup_ratio", "save_steps", "eval_steps"}
FIXED = {"output_dir", "warmup_steps", "remove_unused_columns"}
_CHOICES = {  # field: (file, enumeration)
    "lr_scheduler_type": ("trainer_utils.py", "SchedulerType"),
    "optim": ("training_args.py", "OptimizerNames"),
    "save_strategy": ("trainer_utils.py", "SaveStrategy"),
    "logging_strategy": ("trainer_utils.py", "IntervalStrategy"),
    "eval_strategy": ("trainer_utils.py", "IntervalStrategy"),
    "hub_strategy": ("trainer_utils.py", "HubStrategy"),
}
_PACKAGES = {  # of trackers whose package has another name, or that need several
    "azure_ml": ("azureml",),
    "dagshub": ("dagshub", "mlflow"),
    "flyte": ("flytekit",),
    "kubeflow": (),
}
_EVALUATES = {"eval_strategy": "no", "do_eval": False, "eval_on_start": False, "load_best_model_at_end": False}


@functools.cache
def _source(name: str) -> ast.Module:
    """Return the parsed source of a file of transformers, or an empty module without transformers."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return ast.Module([], [])
    return ast.parse((Path(spec.submodule_search_locations[0]) / name).read_text(encoding="utf-8"))


def _class(file: str, name: str) -> list[ast.stmt]:
    return next((node.body for node in _source(file).body if isinstance(node, ast.ClassDef) and node.name == name), [])


@functools.cache
def fields() -> frozenset[str]:
    """Return the names of the fields of TrainingArguments that can be given."""
    found = set()
    for node in _class("training_args.py", "TrainingArguments"):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            options = {k.arg: k.value for k in node.value.keywords} if isinstance(node.value, ast.Call) else {}
            off = options.get("init")
            if not (isinstance(off, ast.Constant) and off.value is False):
                found.add(node.target.id)
    return frozenset(found)


@functools.cache
def choices(field: str) -> tuple[str, ...]:
    """Return the values that a field with a fixed choice may have."""
    return tuple(
        str(node.value.value)
        for node in _class(*_CHOICES[field])
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    )


@functools.cache
def trackers() -> tuple[str, ...]:
    """Return the trackers that transformers can report to, sorted."""
    for node in _source("integrations/integration_utils.py").body:
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)):
            continue
        if any(isinstance(target, ast.Name) and target.id == "INTEGRATION_TO_CALLBACK" for target in node.targets):
            return tuple(sorted(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)))
    return ()


def is_installed(tracker: str) -> bool:
    """Return whether the packages of a tracker can be found; nothing is imported."""
    if tracker == "tensorboard":
        return any(importlib.util.find_spec(name) is not None for name in ("tensorboard", "tensorboardX"))
    return all(importlib.util.find_spec(name) is not None for name in _PACKAGES.get(tracker, (tracker,)))


def check_trainer_settings(settings: Any, fixed: Collection[str] = ()) -> None:
    """Refuse what transformers' Trainer does not know or no trainer here does.

    Args:
        settings: A dataclass with ``trainer_arguments``; an ``eval_steps`` says that it evaluates.
        fixed: Further fields that the trainer decides on.

    Raises:
        ConfigError: Naming the key, the value and what is valid.
    """
    own = {field.name for field in dataclasses.fields(settings)}
    if known := fields():
        _check_fields(settings.trainer_arguments, own, known, fixed)
    values = {name: getattr(settings, name) for name in own - TRANSLATED} | settings.trainer_arguments
    for name in _CHOICES:
        if name in values:
            _check_choice(name, values[name], own)
    _check_trackers(values.get("report_to"), own)
    _check_supported(settings.trainer_arguments, evaluates="eval_steps" in own)


def key_of(name: str, own: Collection[str]) -> str:
    """Return where a user sets a field."""
    return name if name in own else f"trainer_arguments: {name}"


def _check_fields(given: dict[str, Any], own: set[str], known: Collection[str], fixed: Collection[str]) -> None:
    for name, value in given.items():
        if line := now_called(name, value, own):
            raise ConfigError(_own_key(name, line))
        if name in own:
            raise ConfigError(_own_key(name, line_of(name, value)))
        if name in own | FIXED | set(fixed):
            raise ConfigError(f"trainer_arguments: {name!r} is fixed here, or set by a key of its own; leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"trainer_arguments: transformers' TrainingArguments has no {name!r} (nearest: {near!r})")


def _own_key(name: str, line: str) -> str:
    return f"trainer_arguments: {name!r} has a key of its own here; write '{line}' at the top of the recipe"


def _check_choice(name: str, value: Any, own: set[str]) -> None:
    valid, value = choices(name), str(getattr(value, "value", value))
    if valid and value not in valid:
        near = difflib.get_close_matches(value, valid, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"{key_of(name, own)}: {value!r} is unknown (nearest: {near!r}); choose from {', '.join(valid)}"
        )


def _check_trackers(wanted: Any, own: set[str]) -> None:
    valid = trackers()
    for name in [wanted] if isinstance(wanted, str) else wanted or []:
        if name in ("none", "all") or not valid:
            continue
        if name not in valid:
            raise ConfigError(
                f"{key_of('report_to', own)}: {name!r} is unknown; choose from none, all, {', '.join(valid)}"
            )
        if not is_installed(name):
            refuse_tracker(name, [one for one in valid if _PACKAGES.get(one) != () and is_installed(one)], own)


def refuse_tracker(name: str, installed: Collection[str], own: Collection[str]) -> None:
    """Refuse a tracker whose package is missing."""
    hint = "" if name in _PACKAGES else f" (pip install {name})"
    raise ConfigError(
        f"{key_of('report_to', own)}: {name!r} needs its package, which is not installed; install it"
        f"{hint}, or choose from {', '.join(['none', *installed])}"
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
