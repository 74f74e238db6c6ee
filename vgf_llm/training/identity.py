"""The identity of a training run: a checkpoint of another run is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reward_models.grammar import reward_contents
from vgf_llm.data.contents import scorer_contents
from vgf_llm.distributed.shards import engine_name
from vgf_llm.models.loading import fingerprint
from vgf_llm.settings import SamplingSettings
from vgf_llm.settings.parse import dump
from vgf_llm.training.policy_models import PolicyModels
from vgf_llm.training.rollout import PromptRow
from vgf_llm.training.settings import OptimSettings, PolicySettings, TrainScript, VGFSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

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

    `identity_of_models` adds what is known once the models are prepared.
    """
    rows = json.dumps([[row.index, row.ids] for row in prompts])
    tokens = fingerprint(tokenizer)
    how = _HOW if method.direction else (*_HOW, "direction_options")
    start = method.learned_value.start_from if method.value == "learned" else None
    return {
        "model": dump(policy),
        "tokenizer": [tokens.tokenizer, tokens.template],
        "dataset": hashlib.sha256(rows.encode()).hexdigest(),
        "rewards": [reward_contents(name) for name in script.rewards],
        "reward_weights": list(script.reward_weights),
        **({"reward_outputs": script.reward_outputs} if script.reward_outputs else {}),
        "value_weights": None if start is None else scorer_contents(start),
        **{key: value for key, value in dump(method).items() if key not in how},
        "sampling": dataclasses.asdict(sampling),
        "optimisation": {name: getattr(optim, name) for name in _OPTIM},
        "trainer_arguments": optim.trainer_arguments,
        "processes": world_size,
    }


def identity_of_models(models: PolicyModels, accelerator: Accelerator) -> dict[str, Any]:
    """Return the engine, the precision it computes in, and a digest of the base's weights, which must be whole."""
    with models.reference() as base:
        named = [(name, p) for name, p in base.named_parameters() if "lora_" not in name]
    return {
        "engine": engine_name(accelerator),
        "mixed_precision": str(accelerator.mixed_precision),
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
