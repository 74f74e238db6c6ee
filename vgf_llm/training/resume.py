"""Where a run goes on from, and what must not have changed since."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgf_llm.config import dump
from vgf_llm.errors import CheckpointError, ConfigError
from vgf_llm.models import fingerprint
from vgf_llm.settings import SamplingSettings
from vgf_llm.training.checkpoint import newest_whole
from vgf_llm.training.config import OptimSettings, PolicySettings, TrainScript, VGFSettings
from vgf_llm.training.manifest import check_identity, verify
from vgf_llm.training.rollout import PromptRow

if TYPE_CHECKING:
    from vgf_llm.training.trainer import VGFTrainer

_OPTIM = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_ratio",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "seed",
)


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
    """Return what a checkpoint is a checkpoint of: model, data, rewards, method, optimisation, processes."""
    rows = json.dumps([[row.index, row.ids] for row in prompts])
    tokens = fingerprint(tokenizer)
    return {
        "model": dump(policy),
        "tokenizer": [tokens.tokenizer, tokens.template],
        "dataset": hashlib.sha256(rows.encode()).hexdigest(),
        "rewards": [_reward_identity(name) for name in script.rewards],
        "reward_weights": list(script.reward_weights),
        **dump(method),
        "sampling": dataclasses.asdict(sampling),
        "optimisation": {name: getattr(optim, name) for name in _OPTIM},
        "processes": world_size,
    }


def _reward_identity(name: str) -> str:
    """A function by its name, a model by its weights."""
    if not Path(name).is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(Path(name).glob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def checkpoint_to_resume(trainer: VGFTrainer, optim: OptimSettings) -> str | None:
    """Return the checkpoint that training goes on from, checked, or None for a new run.

    Raises:
        CheckpointError: The one that is named is not whole.
        ConfigError: It is of another run; names what differs. Or there is none of that name.
    """
    from accelerate.utils import broadcast_object_list

    wanted = optim.resume_from_checkpoint
    if wanted is False:
        return None
    folder: Path | None
    if wanted is True:
        first = trainer.is_world_process_zero()
        (folder,) = broadcast_object_list([newest_whole(trainer.args.output_dir) if first else None])
        if folder is None:
            if first:
                print(f"'{trainer.args.output_dir}' holds no whole checkpoint: starting anew", file=sys.stderr)
            return None
    else:
        folder = Path(wanted)
        if not folder.is_dir():
            raise ConfigError(f"resume_from_checkpoint: '{wanted}' is no folder; true takes the newest of output_dir")
    try:
        manifest = verify(folder)
    except CheckpointError as error:
        raise CheckpointError(f"resume_from_checkpoint: {error}") from error
    check_identity(manifest, trainer.identity, optim.allow_changes)
    if trainer.is_world_process_zero():
        print(f"going on from '{folder}'", file=sys.stderr)
    return str(folder)
