"""Value training on transformers' Trainer: TD(lambda) targets of a slow target network, expectile regression.

One forward a batch gives the value of every prefix, a second one without a graph those of the target network (left out
at lambda 1, where no target value is read). The loss is a mean over all prefixes of an optimiser step, however they are
spread over devices and accumulation steps. Checkpoints hold the target network beside the value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback

from reward_models.pooling import prefix_columns
from reward_models.trainer import ScoreTrainer
from reward_models.value_losses import td_lambda_targets, value_loss
from reward_models.value_model import EmaTarget
from reward_models.value_settings import ValueTraining
from vgf_llm.distributed.gather import whole_weights
from vgf_llm.errors import ConfigError

TARGET_NAME = "target.safetensors"


class ValueTrainer(ScoreTrainer):
    """Trainer over `LoggedCollator` batches; its targets are the rewards [R]."""

    target_name = "reward"

    def __init__(self, *args: Any, settings: ValueTraining, **kwargs: Any) -> None:
        """Take the Trainer's arguments and the loss settings."""
        super().__init__(*args, settings=settings, compute_metrics=last_value_figures, **kwargs)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the count itself
        model: Any = self.model
        self.target = EmaTarget(model)
        self.add_callback(_MoveTarget(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Regress the value of every prefix on its target; outputs are the values of the whole responses."""
        batch = {name: tensor for name, tensor in inputs.items() if name != "reward"}
        target_RS = None
        if self.settings.td_lambda < 1:
            with whole_weights(self.accelerator, model) as plain:
                target_RS = self.target.call(plain, **batch, token_level=True)
        values_RT1, mask_RT1 = prefix_columns(model(**batch, token_level=True), batch["response_mask"])
        target_values_RT1 = torch.zeros_like(values_RT1)
        if target_RS is not None:
            target_values_RT1, _ = prefix_columns(target_RS, batch["response_mask"])
        targets_RT1 = td_lambda_targets(target_values_RT1, inputs["reward"], mask_RT1[:, 1:], self.settings.td_lambda)
        loss, metrics = value_loss(values_RT1, targets_RT1, mask_RT1, self.settings.expectile, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over the devices
        if model.training:
            self.record(metrics)
        lengths_R = mask_RT1.sum(dim=-1) - 1
        return (loss, values_RT1.gather(1, lengths_R[:, None])[:, 0]) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Count the prefixes of an optimiser step, the prompt alone included, over all devices."""
        if not batch_samples:
            return None
        own = sum(int(batch["response_mask"].sum()) + len(batch["reward"]) for batch in batch_samples)
        return self.over_devices(own, device)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, and into a checkpoint the target network beside it; called on all processes."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save:
            save_file(self.target.state_dict(), Path(output_dir or self._folder) / TARGET_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / TARGET_NAME
        if not path.is_file():
            raise ConfigError(f"resume: '{path.parent}' has no {TARGET_NAME}; name a value's checkpoint")
        self.target.load_state_dict(load_file(path))


class _MoveTarget(TrainerCallback):
    """Moves the target network after every optimiser step."""

    def __init__(self, trainer: ValueTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Take over a share of the value."""
        trainer = self.trainer
        with whole_weights(trainer.accelerator, trainer.model_wrapped) as plain:
            trainer.target.update(plain, trainer.settings.target_tau)


def last_value_figures(prediction: EvalPrediction) -> dict[str, float]:
    """Return the root mean squared error of values of whole responses, and the variance they explain (NaN: none)."""
    values_R, rewards_R = (torch.as_tensor(array) for array in (prediction.predictions, prediction.label_ids))
    return value_figures(values_R, rewards_R)


def value_figures(values_R: Tensor, rewards_R: Tensor) -> dict[str, float]:
    """Return `value_error` and `explained_variance` of the values of whole responses."""
    ones_R1 = torch.ones_like(values_R)[:, None]
    _, metrics = value_loss(values_R[:, None], rewards_R[:, None], ones_R1)
    return {name: float(metrics[name]) for name in ("value_error", "explained_variance")}
