"""Whole weights of a reward model that DeepSpeed or FSDP2 has split, as they are saved.

What is trained comes from the engine: under DeepSpeed from the float32 copy that its optimiser steps, since the weights
that it computes with may be bfloat16. What is frozen comes from before the engine, bit for bit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Trainer

from reward_models.loading import reward_model
from vgf_llm.distributed.gather import full_tensors
from vgf_llm.machine.precision import is_sharded


def is_split(trainer: Trainer) -> bool:
    """Return whether an engine holds the model's weights in another form than the model itself."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def frozen_tensors(trainer: Any) -> dict[str, Tensor]:
    """Copy what an engine will split and training leaves alone: frozen parameters and saved buffers, by name.

    A LoRA saves neither, so that there is nothing to copy; nor is there without an engine.

    Args:
        trainer: A ``ScoreTrainer`` whose model no engine has prepared yet.
    """
    model = trainer.model
    inner = reward_model(model)
    if inner.skip_head is not None:
        _ = inner.table_scale  # read off the embedding table, which an engine may split
    if not is_sharded(trainer.settings) or hasattr(model, "peft_config"):
        return {}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items() if name not in trained}


def whole_tensors(trainer: Any, frozen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the model's folder holds, whole and on the host; called on all processes.

    Args:
        trainer: A ``ScoreTrainer`` whose model an engine has prepared.
        frozen: From :func:`frozen_tensors`.
    """
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainer.is_deepspeed_enabled:
        return full_tensors(model, list(parameters)) | frozen
    from deepspeed.utils import safe_get_full_fp32_param

    trained = {}
    for name, parameter in parameters.items():
        found = safe_get_full_fp32_param(parameter)
        trained[name] = full_tensors(model, [name])[name] if found is None else found.cpu().clone()
    return trained | frozen
