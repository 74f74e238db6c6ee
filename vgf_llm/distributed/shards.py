"""Sharded state in a checkpoint: the name of what shards, its own shards, and whether a checkpoint holds what it reads.

Frozen weights are in no checkpoint: they are the base's, whose digest is in the manifest. Trained ones are in the
policy's own files and in trained.safetensors, so FSDP2's shards hold the optimiser alone; DeepSpeed keeps its own
copies of trained weights with its optimiser, which needs them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vgf_llm.errors import CheckpointError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer

_FILES = {"DDP": ("optimizer.pt",), "ZeRO": ("global_step*",), "FSDP": ("optimizer_0", "optimizer.bin")}
_LIBRARIES = {"DDP": "one process or DDP", "ZeRO": "DeepSpeed", "FSDP": "FSDP"}


def engine_name(accelerator: Accelerator) -> str:
    """Return ``DDP``, ``ZeRO-<stage>`` or ``FSDP<version>``; a single process counts as DDP, whose files it writes."""
    from accelerate import DistributedType

    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    return "DDP"


def require_state(folder: Path, engine: str) -> None:
    """Refuse a checkpoint without the optimiser state that is read: the Trainer would start it anew, silently.

    Args:
        folder: Of the checkpoint.
        engine: Of `engine_name`.

    Raises:
        CheckpointError: It was written under another one, or was saved without.
    """

    def holds(kind: str) -> bool:
        return any(any(folder.glob(name)) for name in _FILES[kind])

    kind = next(kind for kind in _FILES if engine.startswith(kind))
    if holds(kind):
        return
    wrote = next((_LIBRARIES[other] for other in _FILES if holds(other)), None)
    if wrote is None:
        raise CheckpointError(
            f"resume: '{folder}' holds no optimiser state, as under trainer_arguments: {{save_only_model: true}}; only "
            "its weights can be used: name it as a model, or continue from a checkpoint saved without that setting"
        )
    raise CheckpointError(
        f"resume: '{folder}' holds no optimiser state that {_LIBRARIES[kind]} ({engine}) reads "
        f"({' or '.join(_FILES[kind])}); it holds the state of {wrote}: resume under that"
    )


def save_engine_state(trainer: Trainer, folder: str) -> None:
    """Write the shards of DeepSpeed or FSDP2, and the schedule; called on all ranks.

    Raises:
        OSError, RuntimeError: Something cannot be written.
    """
    from accelerate.utils import DeepSpeedSchedulerWrapper, save_fsdp_optimizer

    model: Any = trainer.model
    engine: Any = trainer.model_wrapped
    scheduler: Any = trainer.lr_scheduler
    if trainer.is_deepspeed_enabled:
        with without_frozen(model):
            engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    else:
        plugin = trainer.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, model, folder)
    if trainer.args.should_save and not isinstance(scheduler, DeepSpeedSchedulerWrapper):
        torch.save(scheduler.state_dict(), os.path.join(folder, "scheduler.pt"))


@contextlib.contextmanager
def without_frozen(model: nn.Module) -> Iterator[None]:
    """Let a model's state_dict leave frozen parameters out, and its load_state_dict not miss them.

    Under every name: a tied weight has several, and DeepSpeed leaves out the first only.
    """
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in frozen & state.keys():
            del state[name]

    def excuse(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]

    hooks = [model.register_state_dict_post_hook(drop), model.register_load_state_dict_post_hook(excuse)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def copy_whole(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Copy a whole tensor into a parameter, into this process's part of it where FSDP2 has sharded it."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        whole = tensor.to(parameter.device, parameter.dtype)
        tensor = distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
    parameter.copy_(tensor)
