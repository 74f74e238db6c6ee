"""FSDP2 that shards or says that it does not.

accelerate turns FSDP on for accelerators only. On CPUs it takes the same configuration, replicates the whole model as
DDP would and says nothing, while the trainer saves as if it were sharded. ``shard_on_cpu`` lets accelerate's own FSDP2
code run over gloo, for tests and for machines without a GPU; ``require_sharding`` refuses a model that stayed whole.
"""

from __future__ import annotations

import os

from torch import nn

from vgf_llm.errors import ConfigError


def fsdp_was_asked_for() -> bool:
    """Whether the launch configuration says ``distributed_type: FSDP``."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard_on_cpu() -> bool:
    """Let accelerate shard over CPU processes; called after TrainingArguments are made, before the Trainer is.

    accelerate looks at the kind of processes only to decide whether FSDP may be on, and takes the device from
    elsewhere: reported as processes with a GPU each, they get the device mesh, wrapping and checkpoints that GPUs get.

    Returns:
        Whether it changed anything: False without FSDP, on accelerators, and for a single process.
    """
    from accelerate import DistributedType, PartialState

    if not fsdp_was_asked_for() or not PartialState._shared_state:
        return False
    state = PartialState()
    if state.distributed_type != DistributedType.MULTI_CPU or state.num_processes == 1:
        return False
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return True


def require_sharding(model: nn.Module) -> None:
    """Refuse a run that asked for FSDP and got whole copies of the model.

    Args:
        model: the prepared model (``trainer.model_wrapped`` once training has started).

    Raises:
        ConfigError: FSDP was asked for and no part of the model is sharded by FSDP2.
    """
    if not fsdp_was_asked_for():
        return
    from torch.distributed.fsdp import FSDPModule

    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        version = os.environ.get("FSDP_VERSION", "1")
        raise ConfigError(
            f"distributed_type: FSDP (fsdp_version {version}) was asked for, but the model is a whole "
            f"{type(model).__name__} on every process; use fsdp_version 2 on more than one process, as in "
            "recipes/accelerate_configs/fsdp2.yaml, or another of the configurations there"
        )
