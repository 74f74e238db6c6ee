"""Where a run goes on from, and what must not have changed since."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vgf_llm.console.screen import say
from vgf_llm.distributed.processes import of_first
from vgf_llm.distributed.shards import engine_name, require_state
from vgf_llm.errors import CheckpointError, ConfigError
from vgf_llm.models.loading import fingerprint
from vgf_llm.runs.checkpoint import beyond, newest_whole, supersede
from vgf_llm.runs.manifest import check_identity, verify
from vgf_llm.settings import SamplingSettings
from vgf_llm.settings.parse import dump
from vgf_llm.training.rollout import PromptRow
from vgf_llm.training.settings import OptimSettings, PolicySettings, TrainScript, VGFSettings

if TYPE_CHECKING:
    from vgf_llm.training.trainer import VGFTrainer

_OPTIM = (
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_ratio",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "seed",
)
_LENGTH = ("optimisation.max_steps", "optimisation.num_train_epochs")  # may change: a run may be made longer or shorter
_HOW = ("engine", "sync_check")  # of the method: how a run is made, not what it makes
_SAMPLED = 1024  # values of a parameter that go into its digest one by one
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a value
_CHUNK = 2**24  # values that are summed at a time


def identity_of(
    script: TrainScript,
    policy: PolicySettings,
    method: VGFSettings,
    optim: OptimSettings,
    sampling: SamplingSettings,
    prompts: list[PromptRow],
    tokenizer: Any,
    world_size: int,
) -> dict[str, Any]:
    """Return what a checkpoint is a checkpoint of: model, data, rewards, method, optimisation, processes.

    `identity_of_trainer` adds what is known once the trainer is there.
    """
    rows = json.dumps([[row.index, row.ids] for row in prompts])
    tokens = fingerprint(tokenizer)
    start = method.learned_value.start_from if method.value == "learned" else None
    return {
        "model": dump(policy),
        "tokenizer": [tokens.tokenizer, tokens.template],
        "dataset": hashlib.sha256(rows.encode()).hexdigest(),
        "rewards": [_contents(name) for name in script.rewards],
        "reward_weights": list(script.reward_weights),
        "value_weights": None if start is None else _contents(start),
        **{key: value for key, value in dump(method).items() if key not in _HOW},
        "sampling": dataclasses.asdict(sampling),
        "optimisation": {name: getattr(optim, name) for name in _OPTIM},
        "trainer_arguments": optim.trainer_arguments,
        "processes": world_size,
    }


def identity_of_trainer(trainer: VGFTrainer) -> dict[str, Any]:
    """Return the engine, the precision it computes in, and a digest of the base's weights, which must be whole."""
    with trainer.models.reference() as base:
        named = [(name, p) for name, p in base.named_parameters() if "lora_" not in name]
    return {
        "engine": engine_name(trainer.accelerator),
        "mixed_precision": str(trainer.accelerator.mixed_precision),
        "weights": weights_digest(named),
    }


@torch.no_grad()
def weights_digest(named: Iterable[tuple[str, nn.Parameter]]) -> str:
    """Return a SHA-256 over each parameter's name, shape, dtype, first values, and the sum of all of them.

    Values are summed as the integers their bits stand for: exact, whatever the device and the number of threads.

    Args:
        named: Parameters by name, whole.
    """
    digest = hashlib.sha256()
    for name, parameter in named:
        bits = parameter.detach().reshape(-1).view(_INTEGERS[parameter.element_size()])
        total = sum(int(part.sum(dtype=torch.int64)) for part in bits.split(_CHUNK))
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype), total]).encode())
        digest.update(bits[:_SAMPLED].cpu().numpy().tobytes())
    return digest.hexdigest()


def _contents(name: str) -> str:
    """A function by its name, a model's folder by its weights and configuration."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def checkpoint_to_resume(trainer: VGFTrainer, optim: OptimSettings) -> str | None:
    """Return the checkpoint that training goes on from, checked, or None for a new run.

    Called by all processes. Checkpoints of output_dir beyond that step would be taken for newer ones of this run: they
    are set aside where this run goes on with an earlier one of theirs, and are an error otherwise.

    Raises:
        CheckpointError: The one that is named is not whole, or lacks what the engine reads.
        ConfigError: It is of another run; names what differs. Or there is none of that name. Or a new run would
            overwrite another's.
        OutputError: A later checkpoint cannot be set aside.
    """
    wanted = optim.resume_from_checkpoint
    folder, step = _find(trainer, wanted), 0
    if folder is not None:
        step = _check(folder, trainer, optim)
    _make_way(trainer, folder, step, goes_on=wanted is True)
    if folder is None:
        return None
    if trainer.is_world_process_zero():
        say(f"going on from '{folder}'")
    return str(folder)


def _find(trainer: VGFTrainer, wanted: bool | str) -> Path | None:
    """Return the folder that is named, or the newest whole one."""
    if wanted is False:
        return None
    if wanted is not True:
        if not Path(wanted).is_dir():
            raise ConfigError(f"resume_from_checkpoint: '{wanted}' is no folder; true takes the newest of output_dir")
        return Path(wanted)
    first = trainer.is_world_process_zero()
    folder = of_first(newest_whole(trainer.args.output_dir) if first else None)
    if folder is None and first:
        say(f"'{trainer.args.output_dir}' holds no whole checkpoint: starting anew")
    return folder


def _check(folder: Path, trainer: VGFTrainer, optim: OptimSettings) -> int:
    """Verify a checkpoint and that it is of this run; returns its step."""
    try:
        manifest = verify(folder)
    except CheckpointError as error:
        raise CheckpointError(f"resume_from_checkpoint: {error}") from error
    allowed = check_identity(manifest, trainer.whole_identity, optim.allow_changes, _LENGTH)
    require_state(folder, engine_name(trainer.accelerator))
    if trainer.is_world_process_zero():
        for change in allowed:
            say(f"changed since the checkpoint: {change}")
    return manifest.step


def _make_way(trainer: VGFTrainer, folder: Path | None, step: int, goes_on: bool) -> None:
    """Set later checkpoints of this run aside, and refuse to mix with those of another one."""
    output_dir, first = Path(trainer.args.output_dir), trainer.is_world_process_zero()
    own = goes_on or (folder is not None and folder.resolve().parent == output_dir.resolve())
    found = of_first(beyond(output_dir, step if own else 0) if first else [])
    if not found:
        return
    names = ", ".join(path.name for path in found)
    if not own:
        raise ConfigError(
            f"output_dir '{output_dir}' holds {names} of another run, which this one would mix with its own and "
            "delete; set resume_from_checkpoint: true to go on with that run, name another output_dir, or remove them"
        )
    if first:
        say(f"set aside as .<name>.superseded: {names}")
        supersede(found)
