"""Reward-model training on transformers' Trainer: one forward of 2B rows a batch, Bradley-Terry loss.

`ScoreTrainer` is what reward and value training share: a rate of their own for the heads, the logged means, and what a
checkpoint holds.

Departs from TRL's RewardTrainer: scores are pooled by mask (pad == eos is harmless), the head is trained and saved
under LoRA too, and checkpoints hold the reward model's own config.json.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from reward_models.loading import ADAPTER_NAME, reward_model
from reward_models.losses import bradley_terry
from reward_models.settings import RewardTraining, TrainerSettings
from reward_models.splitting import frozen_tensors, is_split, whole_tensors
from vgf_llm.distributed.fsdp import require_sharding, shard_on_cpu
from vgf_llm.errors import ConfigError
from vgf_llm.machine.precision import require_float32


class ScoreTrainer(Trainer):
    """Trainer of a model with linear heads; a subclass computes the loss and records its metrics."""

    def __init__(self, *args: Any, settings: TrainerSettings, **kwargs: Any) -> None:
        """Take the Trainer's arguments and the loss settings."""
        shard_on_cpu()
        super().__init__(*args, **kwargs)
        require_float32(self)
        self.settings: Any = settings
        self._frozen = frozen_tensors(self)
        self._sums: dict[str, Tensor] = {}
        self._batches = 0

    def record(self, metrics: dict[str, Tensor]) -> None:
        """Add a training batch's metrics to those of the next log line."""
        self._batches += 1
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the Trainer's optimiser, with a learning rate of their own for the linear heads where one is set."""
        if self.optimizer is not None or self.settings.head_learning_rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        named = (self.model if model is None else model).named_parameters()
        heads = [p for name, p in named if {"head", "skip_head"} & set(name.split(".")) and p.requires_grad]
        members = {id(parameter) for parameter in heads}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in members]
        optimizer.add_param_group({"params": heads, "lr": self.settings.head_learning_rate, "weight_decay": 0.0})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean training metrics since the last training line."""
        if "loss" in logs and self._batches:
            logs |= {name: round(float(total / self._batches), 4) for name, total in self._sums.items()}
            self._sums, self._batches = {}, 0
        super().log(logs, start_time)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Prepare as the Trainer does, and refuse a model that FSDP was to shard and did not."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        require_sharding(self.model_wrapped)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, whole where an engine has split it; called on all processes."""
        if not is_split(self):
            super().save_model(output_dir, _internal_call)
            return
        tensors = whole_tensors(self, self._frozen)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, tensors)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        reward_model(self.accelerator.unwrap_model(self.model)).config.save_pretrained(
            output_dir or self.args.output_dir
        )


class RewardTrainer(ScoreTrainer):
    """Trainer over `PairCollator` batches."""

    def __init__(self, *args: Any, settings: RewardTraining, **kwargs: Any) -> None:
        """Take the Trainer's arguments and the loss settings."""
        super().__init__(*args, settings=settings, compute_metrics=pair_accuracy, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Score 2B rows and compare the halves."""
        margin_B = inputs["margin"] * self.settings.margin_scale if self.settings.use_margin else None
        rewards_2B = model(**{name: tensor for name, tensor in inputs.items() if name != "margin"})
        chosen_B, rejected_B = rewards_2B.chunk(2)
        loss, metrics = bradley_terry(chosen_B, rejected_B, margin_B, self.settings.centring)
        if model.training:
            self.record(metrics)
        return (loss, torch.stack([chosen_B, rejected_B], dim=1)) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the loss, the scores [B, 2] and the margins [B]."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, rewards_B2 = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), rewards_B2.detach(), inputs["margin"]


def pair_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of pairs whose chosen response scores higher."""
    chosen_B, rejected_B = prediction.predictions.T
    return {"accuracy": float((chosen_B > rejected_B).mean())}


def checkpoint_to_resume(training: TrainerSettings, output_dir: str | Path, adapter: bool = False) -> str | None:
    """Return the checkpoint folder that training goes on from, None for a new run.

    Raises:
        ConfigError: there is no such checkpoint, or it is a LoRA where `adapter` is false, or the other way round.
    """
    wanted = training.resume_from_checkpoint
    if wanted is None:
        return None
    found = get_last_checkpoint(str(output_dir)) if wanted == "last" else wanted
    if found is None or not Path(found).is_dir():
        place = f"'{output_dir}' holds no checkpoint" if wanted == "last" else f"'{wanted}' is no folder"
        raise ConfigError(f"resume_from_checkpoint: {place}; set save_steps in the first run, or null to start anew")
    if not (Path(found) / TRAINER_STATE_NAME).is_file():
        raise ConfigError(f"resume_from_checkpoint: '{found}' is no checkpoint: it has no {TRAINER_STATE_NAME}")
    if (Path(found) / ADAPTER_NAME).is_file() != adapter:
        kinds = ("a LoRA", "lora_r is 0") if not adapter else ("no LoRA", "lora_r is above 0")
        raise ConfigError(f"resume_from_checkpoint: '{found}' holds {kinds[0]}, but {kinds[1]}; set lora_r as it was")
    return found


def add_embedding_noise(model: nn.Module, scale: float, seed: int = 0) -> Any:
    """Add Gaussian noise to the input embeddings while the model trains; `remove()` on the result ends it.

    Args:
        model: a reward model.
        scale: standard deviation a coordinate, in root mean squares of the embedding table.
        seed: of the noise.
    """
    embedding = reward_model(model).get_input_embeddings()
    generators: dict[torch.device, torch.Generator] = defaultdict()
    std = scale * float(embedding.weight.detach().float().square().mean().sqrt())

    def add_noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(seed)
        noise = torch.randn(output.shape, generator=generators[output.device], device=output.device, dtype=output.dtype)
        return output + std * noise

    return embedding.register_forward_hook(add_noise)
